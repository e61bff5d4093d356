// From float64 values in nats to results as the user sees them, or to their sum or mean.
//
// parameters[0..2] are those of the formula, [12] is its code, [13] where the second group of
// columns begins, and [14] the unit of the result in nats. phase 0: one result a row; NaN where a
// row was not to be read. phase 1, 2: the sum or the mean of the rows that were, by one block.

DEVICE double result(const Call& call, int64 row)
{
    const double* values = call.values + row * call.columns;
    const double* other = values + static_cast<int64>(call.parameters[13]);
    const int code = static_cast<int>(call.parameters[12]);
    return finished(code, values, other, call.parameters) / call.parameters[14];
}

KERNEL(THREADS, BLOCKS) finish(const Call call)
{
    if (call.phase == 0) {
        const int64 step = block_count() * THREADS;
        for (int64 row = block_index() * THREADS + thread_index(); row < call.count; row += step) {
            char* at = call.out;
            at += call.out_offsets ? call.out_offsets[row] : row * call.out_stride;
            store_as(at, call.out_dtype, is_read(call, row) ? result(call, row) : NAN64);
        }
        return;
    }
    double sums[2] = {0.0, 0.0};  // of results, and how many they are
    for (int64 row = thread_index(); row < call.count; row += THREADS) {
        if (is_read(call, row)) {
            sums[0] += result(call, row);
            sums[1] += 1.0;
        }
    }
    team_add(sums);
    if (thread_index() == 0)
        store_as(call.out, call.out_dtype, call.phase == 1 ? sums[0] : sums[0] / sums[1]);
}
