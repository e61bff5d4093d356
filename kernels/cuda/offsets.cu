// Bytes from the first row to each of the others, where no one stride gives them.
//
// A launch adds what one axis of the batch contributes: parameters[0] rows lie between neighbours
// along it, [1] is its length and [2] its stride in bytes. phase 0: the first axis, 1: any other.

KERNEL(THREADS, BLOCKS) offsets(const Call call)
{
    int64* out = reinterpret_cast<int64*>(call.out);
    const int64 inner = static_cast<int64>(call.parameters[0]);
    const int64 length = static_cast<int64>(call.parameters[1]);
    const int64 stride = static_cast<int64>(call.parameters[2]);
    const int64 step = block_count() * THREADS;
    for (int64 row = block_index() * THREADS + thread_index(); row < call.count; row += step) {
        const int64 here = row / inner % length * stride;
        out[row] = call.phase == 0 ? here : out[row] + here;
    }
}
