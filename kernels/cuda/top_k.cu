// How many of the k largest entries two rows have in common, as a share of k = parameters[0].
//
// Which entries are among the k largest is settled by one number: the k-th largest key, where keys
// have the order of the entries; of those that are equal to it the first ones count, up to some
// index. Both are found by counting keys in bins and narrowing the range to one of them, with no
// lists. Entries below the k-th largest of the threads' own maxima need no counting: k entries are
// above. Behind the team's scratch, shared memory has 8 bytes a thread.

constexpr int BINS = 2 * THREADS;

// Bits with the order of the numbers that they stand for: ties are ties (-0 is 0), and NaN is
// above +inf or below -inf.
DEVICE uint64 ordered(uint64 bits)
{
    if (bits == 1ull << 63)
        bits = 0;
    return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// Low bits of a key that are the same for all numbers of a type.
DEVICE int idle_bits(int dtype)
{
    return dtype == FLOAT64 ? 0 : dtype == FLOAT32 ? 32 : dtype == BFLOAT16 ? 48 : 45;
}

DEVICE uint64 key_of(const char* at, int dtype)
{
    uint64 bits;
    switch (dtype) {
    case FLOAT16: bits = static_cast<uint64>(as_bits(Entry<FLOAT16>::get(at))) << 32; break;
    case BFLOAT16: bits = static_cast<uint64>(as_bits(Entry<BFLOAT16>::get(at))) << 32; break;
    case FLOAT32: bits = static_cast<uint64>(as_bits(Entry<FLOAT32>::get(at))) << 32; break;
    default: bits = as_bits(Entry<FLOAT64>::get(at));
    }
    return ordered(bits) >> idle_bits(dtype);
}

struct Entries {
    const char* address;
    int64 stride;
    int dtype;

    DEVICE uint64 key(int64 index) const { return key_of(address + index * stride, dtype); }
};

// Which entries are among the k largest: keys above `key`, and those equal to it up to `index`.
struct Largest {
    uint64 key;
    int64 index;

    DEVICE bool has(uint64 other, int64 at) const
    {
        return other > key || (other == key && at <= index);
    }
};

// The largest of the threads' numbers, of which float64 may not hold all digits.
DEVICE uint64 team_largest(uint64 value)
{
    // First the upper halves, then the lower ones of those that have it.
    const double upper = team_larger(static_cast<double>(value >> 32));
    const bool among = static_cast<double>(value >> 32) == upper;
    const double lower = team_larger(among ? static_cast<double>(value & 0xffffffffull) : -1.0);
    return static_cast<uint64>(upper) << 32 | static_cast<uint64>(lower);
}

// Where the k-th largest key is: at least `low`, and of the `count` keys from there up to the next
// larger ones it is that of rank `rank`. If these are as many, it is enough to know `low`.
struct Range {
    uint64 low;
    int64 rank, count;
};

// Narrow [low, high] around the key of rank `rank`, counted from 1 for the largest, among those
// that visit() shows to a function; none is above `high`.
template <class VISIT>
DEVICE Range narrow(uint64 low, uint64 high, int64 rank, VISIT visit)
{
    uint32* bins = reinterpret_cast<uint32*>(kernel_shared());
    int64 count = 0;
    while (low < high && rank != count) {
        int shift = 0;
        while ((high - low) >> shift >= BINS)
            ++shift;
        for (int i = team_rank(); i < BINS; i += TEAM)
            bins[i] = 0;
        team_barrier();
        visit([&](uint64 key) {
            if (key >= low && key <= high)
                atomic_add(bins + ((key - low) >> shift), 1);
        });
        team_barrier();
        uint64 bin = (high - low) >> shift;
        for (; rank > bins[bin]; --bin)
            rank -= bins[bin];
        count = bins[bin];
        low += bin << shift;
        if ((high - low) >> shift)
            high = low + ((1ull << shift) - 1);
        team_barrier();  // before anyone clears the bins
    }
    return {low, rank, count};
}

// False where an entry is NaN or +inf, or all have no weight.
DEVICE bool find_largest(const Rows& rows, int64 row, int64 width, int64 k, Largest& found)
{
    const Entries entries = {row_address(rows, row), rows.stride, rows.dtype};
    const uint64 bits = rows.dtype == FLOAT64 ? 0x7ff0ull << 48 : 0x7f80ull << 48;
    const uint64 infinity = ordered(bits) >> idle_bits(rows.dtype);
    const uint64 nothing =
        ordered(rows.probabilities ? 0 : bits | 1ull << 63) >> idle_bits(rows.dtype);
    uint64 own = 0;  // the largest key that the thread has seen
    bool bad = false;
    for (int64 j = team_rank(); j < width; j += TEAM) {
        const uint64 key = entries.key(j);
        bad = bad || key < nothing || key >= infinity;
        own = key > own ? key : own;
    }
    const uint64 most = team_largest(own);
    if (team_any(bad) || most == nothing)
        return false;

    uint64 least = nothing;
    if (k <= TEAM) {
        // The k-th largest of the threads' keys.
        uint64* keys = reinterpret_cast<uint64*>(kernel_shared());
        keys[team_rank()] = own;
        team_barrier();
        int above = 0, equal = 0;
        for (int i = 0; i < TEAM; ++i) {
            above += keys[i] > own;
            equal += keys[i] == own;
        }
        least = team_largest(above < k && above + equal >= k ? own : 0);
        team_barrier();
    }
    const Range keys = narrow(least, most, k, [&](auto see) {
        for (int64 j = team_rank(); j < width; j += TEAM)
            see(entries.key(j));
    });
    found = {keys.low, width};
    if (keys.rank != keys.count) {
        // The key is known, and only the first of its entries count.
        const Range places = narrow(0, width - 1, keys.rank, [&](auto see) {
            for (int64 j = team_rank(); j < width; j += TEAM) {
                if (entries.key(j) == keys.low)
                    see(width - 1 - j);
            }
        });
        found.index = width - 1 - static_cast<int64>(places.low);
    }
    return true;
}

DEVICE double overlap(const Call& call, int64 row)
{
    const int64 k = static_cast<int64>(call.parameters[0]);
    Largest in_p, in_q;
    if (!find_largest(call.p, row, call.width, k, in_p) ||
        !find_largest(call.q, row, call.width, k, in_q))
        return NAN64;
    const Entries p = {row_address(call.p, row), call.p.stride, call.p.dtype};
    const Entries q = {row_address(call.q, row), call.q.stride, call.q.dtype};
    double common = 0.0;
    for (int64 j = team_rank(); j < call.width; j += TEAM)
        common += in_p.has(p.key(j), j) && in_q.has(q.key(j), j) ? 1.0 : 0.0;
    return team_add(common) / static_cast<double>(k);
}

KERNEL(THREADS, BLOCKS) top_k(const Call call)
{
    for (int64 row = block_index(); row < call.count; row += block_count()) {
        const double value = is_read(call, row) ? overlap(call, row) : NAN64;
        if (team_rank() == 0)
            call.values[row * call.columns] = value;
    }
}
