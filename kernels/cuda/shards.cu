// What is known of rows that are parts of wider ones, in float64, for any input whatever.
//
// phase 0: three columns of each side, its largest entry m as it is given, L = log sum exp((x - m)/T)
// and the index of m: NaN where a row is no part of a distribution, -inf, 0 and -1 where all of it is
// -inf. Where parameters[0] is 2, for pairs, three columns more: Lx - Ly, from terms that vanish
// where the rows agree, and both entries, as they are given, where log(p/q) is largest on the support
// of P; NaN unless both sides have one.
//
// phase 1 and 2: in one column, the share of these rows in the sum of total variation, or of
// Jensen-Shannon with the weight parameters[0], over whole rows. into_p has five numbers a row, m and
// L of the whole rows of P, of Q, and Lx - Ly.

DEVICE double given(const Rows& rows, const char* row, double index)
{
    return entry64(row + static_cast<int64>(index) * rows.stride, rows.dtype);
}

DEVICE void describe_side(const Rows& rows, int64 row, int64 width, double* values)
{
    const char* x = row_address(rows, row);
    Peak top;
    bool bad = false;
    for (int64 j = team_rank(); j < width; j += TEAM) {
        const double entry = logit(rows, x, j);
        top.see(entry, j);
        bad = bad || !(entry < INFINITY64);
    }
    top.join();
    bad = team_any(bad);
    const bool empty = !bad && top.value == -INFINITY64;
    double sum = 0.0;
    for (int64 j = team_rank(); !bad && !empty && j < width; j += TEAM) {
        const double entry = logit(rows, x, j);
        if (entry > -INFINITY64 && static_cast<double>(j) != top.index)
            sum += exp(larger((entry - top.value) * rows.inverse_temperature, -LARGEST));
    }
    sum = team_add(sum);
    if (team_rank() != 0)
        return;
    values[0] = bad ? NAN64 : empty ? -INFINITY64 : given(rows, x, top.index);
    values[1] = bad ? NAN64 : log1p(sum);
    values[2] = bad ? NAN64 : empty ? -1.0 : top.index;
}

DEVICE void describe_pair(const Call& call, int64 row, double* values)
{
    Prepared rows(call, row);
    Peak ratio;
    if (rows.valid) {
        rows.normalize(call);
        for (int64 j = team_rank(); j < call.width; j += TEAM) {
            const Index at = rows.index(j);
            ratio.see(at.in_p() ? -at.t : -INFINITY64, j);
        }
        ratio.join();
    }
    if (team_rank() != 0)
        return;
    values[0] = rows.valid ? rows.normalized.offset + rows.normalized.fine : NAN64;
    values[1] = rows.valid ? given(call.p, rows.pair.x, ratio.index) : NAN64;
    values[2] = rows.valid ? given(call.q, rows.pair.y, ratio.index) : NAN64;
}

template <class OPERATION>
DEVICE double share_of(const Call& call, int64 row, double parameter)
{
    const double* whole = reinterpret_cast<const double*>(row_address(call.into_p, row));
    Pair pair{call.p, call.q, row_address(call.p, row), row_address(call.q, row)};
    pair.largest_p = whole[0];
    pair.largest_q = whole[2];
    pair.top_x.value = call.p.probabilities ? log(whole[0]) : whole[0];
    pair.top_y.value = call.q.probabilities ? log(whole[2]) : whole[2];
    const Normalizers normalized = {whole[1], whole[3], whole[4], 0.0};
    if (!(fabs(whole[1]) + fabs(whole[3]) + fabs(whole[4]) < INFINITY64))
        return NAN64;
    double value = 0.0;
    for (int64 j = team_rank(); j < call.width; j += TEAM)
        value += OPERATION::term(normalized.index(pair, j), parameter);
    return larger(team_add(value), 0.0);
}

KERNEL(THREADS, BLOCKS) shards(const Call call)
{
    for (int64 row = block_index(); row < call.count; row += block_count()) {
        double* values = call.values + row * call.columns;
        if (!is_read(call, row)) {
            for (int64 i = team_rank(); i < call.columns; i += TEAM)
                values[i] = NAN64;
        } else if (call.phase == 0) {
            describe_side(call.p, row, call.width, values);
            if (call.parameters[0] == 2.0) {
                describe_side(call.q, row, call.width, values + 3);
                describe_pair(call, row, values + 6);
            }
        } else {
            const double value = call.phase == 1
                                     ? share_of<Divergence>(call, row, Divergence::VARIATION)
                                     : share_of<JensenShannon>(call, row, call.parameters[0]);
            if (team_rank() == 0)
                values[0] = value;
        }
    }
}
