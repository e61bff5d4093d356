// Rows of logits in memory, as kernels read them, and where results go.
//
// DTYPE_P and DTYPE_Q say what a kernel reads; a kernel of one row ignores DTYPE_Q.

#pragma once

#define FLOAT16 0
#define BFLOAT16 1
#define FLOAT32 2
#define FLOAT64 3

#define INFINITY32 as_float(0x7f800000u)
#define INFINITY64 as_double(0x7ff0000000000000ull)
#define NAN64 as_double(0x7ff8000000000000ull)
#define NAN32 as_float(0x7fc00000u)

// A batch of rows. The host fills it: the layout is known to launches.py.
struct Rows {
    const char* data;          // the first entry of row 0
    const int64* offsets;      // bytes from row 0 to each row; null where row_stride gives them
    int64 row_stride;          // bytes
    int64 stride;              // bytes from an entry to the next
    double inverse_temperature;
    int dtype;                 // FLOAT16 ...; kernels that are compiled for one do not look
    int probabilities;         // whether entries are probabilities and not logits
};

// All that a launch is told. One struct for all kernels: each reads what concerns it.
struct Call {
    Rows p, q;
    int64 width;               // entries of a row
    int64 count;               // rows
    const uint8* where;        // one a row: 0 where it must not be read; null: read all
    const int64* tokens;       // one a row, or null
    double* values;            // results in float64, `columns` a row
    int64 columns;
    double parameters[16];     // order, weight, k ..., as each kernel documents
    char* out;                 // results as the user sees them (finish, log_softmax, gradient)
    const int64* out_offsets;  // bytes from the first result to each row's; null: out_stride
    int64 out_stride;
    int out_dtype;
    int phase;                 // which of the things that a kernel can do, as it documents
    int64 resident;            // entries of a part that its block keeps in shared memory
    int64 parts;               // parts of a row, each the work of one block
    int64 part_width;          // entries of a part, a multiple of 64
    double* states;            // room for the state of every part
    uint32* arrived;           // for each row, how many parts have been finished; all 0
    Rows into_p, into_q;       // where gradients go, if there is an address
    const double* scales;      // of the gradient of each row; null: 1
};

// A kernel that cannot finish a row to full accuracy leaves this NaN for `exact`.
#define UNFINISHED as_double(0x7ff8000000c0ffeeull)
DEVICE bool is_unfinished(double value) { return as_bits(value) == 0x7ff8000000c0ffeeull; }

DEVICE const char* row_address(const Rows& rows, int64 row)
{
    return rows.data + (rows.offsets ? rows.offsets[row] : row * rows.row_stride);
}

DEVICE bool is_read(const Call& call, int64 row) { return !call.where || call.where[row]; }

template <int DTYPE>
struct Entry;
template <>
struct Entry<FLOAT16> {
    static constexpr int size = 2;
    static DEVICE float get(const char* at)
    {
        return half_to_float(load_one(reinterpret_cast<const uint16*>(at)));
    }
};
template <>
struct Entry<BFLOAT16> {
    static constexpr int size = 2;
    static DEVICE float get(const char* at)
    {
        return bfloat_to_float(load_one(reinterpret_cast<const uint16*>(at)));
    }
};
template <>
struct Entry<FLOAT32> {
    static constexpr int size = 4;
    static DEVICE float get(const char* at) { return load_one(reinterpret_cast<const float*>(at)); }
};
template <>
struct Entry<FLOAT64> {
    static constexpr int size = 8;
    static DEVICE double get(const char* at)
    {
        return load_one(reinterpret_cast<const double*>(at));
    }
};

// An entry of any type, in float64: exact.
DEVICE double entry64(const char* at, int dtype)
{
    switch (dtype) {
    case FLOAT16: return double_of(Entry<FLOAT16>::get(at));
    case BFLOAT16: return double_of(Entry<BFLOAT16>::get(at));
    case FLOAT32: return double_of(Entry<FLOAT32>::get(at));
    default: return Entry<FLOAT64>::get(at);
    }
}

// Entries that a thread reads at a time: 16 bytes of the narrower array.
#if defined(DTYPE_P)
#ifndef DTYPE_Q
#define DTYPE_Q DTYPE_P
#endif
constexpr int VECTOR = (Entry<DTYPE_P>::size == 4 && Entry<DTYPE_Q>::size == 4) ? 4 : 8;

DEVICE float largest_of(const float (&x)[VECTOR])
{
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < VECTOR; ++i)
        largest = larger(largest, x[i]);
    return largest;
}

// Where an entry stands first.
DEVICE int place_of(const float (&x)[VECTOR], float entry)
{
    int place = 0;
#pragma unroll
    for (int i = VECTOR - 1; i >= 0; --i)
        place = x[i] == entry ? i : place;
    return place;
}
#endif

template <int DTYPE, int COUNT>
struct Packed;
template <int DTYPE, int COUNT>
OUTLINED void store_entries(char* at, Packed<DTYPE, COUNT> entries, int begin, int end);

// VECTOR entries of one array, as they lie in memory: 16 bytes, or 32, or what results take.
template <int DTYPE, int COUNT>
struct alignas(16) Packed {
    static constexpr int WORDS = COUNT * Entry<DTYPE>::size / 4;
    static constexpr int LOADS = WORDS / 4;
    uint32 word[WORDS];

    // The bits of -inf.
    static constexpr uint32 NOTHING =
        DTYPE == FLOAT32 ? 0xff800000u : DTYPE == BFLOAT16 ? 0xff80u : 0xfc00u;

    // From where 16 bytes can be loaded at once.
    template <bool ONCE>
    DEVICE void load(const char* at)
    {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const Bytes16* source = reinterpret_cast<const Bytes16*>(at) + i;
            const Bytes16 bytes = ONCE && LOADS == 1 ? load_once(source) : load_again(source);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                word[4 * i + j] = bytes.word[j];
        }
    }

    // From a place in shared memory.
    static DEVICE Packed from(const Packed* at)
    {
        Packed packed;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const Bytes16 bytes = load_shared(reinterpret_cast<const Bytes16*>(at) + i);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                packed.word[4 * i + j] = bytes.word[j];
        }
        return packed;
    }

    // To a place in shared memory, on its own.
    DEVICE void copy(const char* at)
    {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            copy_async(reinterpret_cast<Bytes16*>(word) + i, at + 16 * i);
    }

    // Entries [begin, end) one by one, and -inf for the others.
    DEVICE void load_some(const char* at, int begin, int end)
    {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (DTYPE == FLOAT32) {
                const uint32* source = reinterpret_cast<const uint32*>(at) + i;
                word[i] = i >= begin && i < end ? load_one(source) : NOTHING;
            } else {
                const uint16* source = reinterpret_cast<const uint16*>(at) + 2 * i;
                const int j = 2 * i + 1;
                const uint32 low = j > begin && j <= end ? load_one(source) : NOTHING;
                const uint32 high = j >= begin && j < end ? load_one(source + 1) : NOTHING;
                word[i] = low | high << 16;
            }
        }
    }

    DEVICE void unpack(float* x) const
    {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (DTYPE == FLOAT32) {
                x[i] = as_float(word[i]);
            } else if constexpr (DTYPE == BFLOAT16) {
                x[2 * i] = bfloat_low(word[i]);
                x[2 * i + 1] = bfloat_high(word[i]);
            } else {
                x[2 * i] = half_low(word[i]);
                x[2 * i + 1] = half_high(word[i]);
            }
        }
    }

    // Rounded to the nearest.
    DEVICE void pack(const float* x)
    {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (DTYPE == FLOAT32)
                word[i] = as_bits(x[i]);
            else if constexpr (DTYPE == BFLOAT16)
                word[i] = bfloats_of(x[2 * i], x[2 * i + 1]);
            else
                word[i] = halves_of(x[2 * i], x[2 * i + 1]);
        }
    }

    // Entries [begin, end) to memory; all of them at once, where 16 bytes can be.
    DEVICE void store(char* at, int begin, int end) const
    {
        if (WORDS % 4 == 0 && begin <= 0 && end >= COUNT && reinterpret_cast<uint64>(at) % 16 == 0) {
#pragma unroll
            for (int i = 0; i + 3 < WORDS; i += 4)
                *reinterpret_cast<Bytes16*>(at + 4 * i) = {word[i], word[i + 1], word[i + 2],
                                                           word[i + 3]};
        } else {
            store_entries(at, *this, begin, end);
        }
    }
};

// Entries [begin, end) to memory, one by one. At the ends of rows, or where vectors are not aligned:
// called from many places, and seldom.
template <int DTYPE, int COUNT>
OUTLINED void store_entries(char* at, Packed<DTYPE, COUNT> entries, int begin, int end)
{
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (i < begin || i >= end)
            continue;
        const uint32 word = entries.word[DTYPE == FLOAT32 ? i : i / 2];
        if constexpr (DTYPE == FLOAT32)
            reinterpret_cast<uint32*>(at)[i] = word;
        else
            reinterpret_cast<uint16*>(at)[i] = static_cast<uint16>(word >> i % 2 * 16);
    }
}

// One row, cut into vectors. ALIGNED rows begin `skew` entries after a multiple of 16 bytes (the
// host has seen to it that this is the same for both arrays of a pair), so that all vectors but
// the first and the last are loaded whole; others entry by entry. Vector v holds the entries from
// v VECTOR - skew on; those outside [0, width) read as -inf.
#ifndef ALIGNED
#define ALIGNED 1
#endif

template <int DTYPE, int COUNT>
struct Row {
    const char* address;
    int64 width;
    int skew;

    DEVICE Row(const char* address, int64 width, int skew)
        : address(address), width(width), skew(skew)
    {
    }

    static DEVICE int skew_of(const char* address)
    {
#if ALIGNED
        return static_cast<int>(reinterpret_cast<uint64>(address) / Entry<DTYPE>::size % COUNT);
#else
        return 0;
#endif
    }

    DEVICE float entry(int64 index) const
    {
        return Entry<DTYPE>::get(address + index * Entry<DTYPE>::size);
    }

    DEVICE bool whole(int64 vector) const
    {
        const int64 first = vector * COUNT - skew;
        return first >= 0 && first + COUNT <= width;
    }

    template <bool ONCE>
    DEVICE Packed<DTYPE, COUNT> load(int64 vector) const
    {
        const int64 first = vector * COUNT - skew;
        Packed<DTYPE, COUNT> packed;
        if (ALIGNED && whole(vector))
            packed.template load<ONCE>(address + first * Entry<DTYPE>::size);
        else
            packed.load_some(address + first * Entry<DTYPE>::size,
                             first < 0 ? static_cast<int>(-first) : 0,
                             width - first < COUNT ? static_cast<int>(width - first) : COUNT);
        return packed;
    }
};

// Round a float64 result once to the type of an array.
OUTLINED void store_as(char* at, int dtype, double value)
{
    switch (dtype) {
    case FLOAT16: {
        const float odd = round_to_odd(value);
        *reinterpret_cast<uint16*>(at) = value == value ? half_of(odd) : 0x7e00;
        break;
    }
    case BFLOAT16: {
        // Half of what is cut off, and one less unless the last bit that stays is set.
        const uint32 bits = as_bits(round_to_odd(value));
        const uint32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        *reinterpret_cast<uint16*>(at) = static_cast<uint16>(value == value ? rounded : 0x7fc0u);
        break;
    }
    case FLOAT32: *reinterpret_cast<float*>(at) = float_of(value); break;
    default: *reinterpret_cast<double*>(at) = value;
    }
}
