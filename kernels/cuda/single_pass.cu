// What there is to know of one row, in one read: its largest entry, its normalizer, its entropy.
//
// OPERATION_statistics writes the five columns of STATISTICS, OPERATION_top only the first and the
// fourth of them, OPERATION_log_softmax x - logsumexp(x) of every entry: to out, parameters[12]
// bytes from one to the next.
//
// With a reference r, z = a x + r and e = 2**z, a thread adds up S = sum e and U = sum e z in
// float32, 32 entries at a time. Its *top*, the largest entry that it has seen, is kept apart, so
// that nothing is lost when one symbol has nearly all the mass: the rest is small, and summed among
// its equals. What a thread compares every vector with is the largest entry of the first tile, so
// that it seldom meets a new top; the old one then goes to the sums, in float64. r is rounded, but
// nothing depends on what it is, and it moves when the top leaves it behind: exponents near the top
// are small and exact. Rows whose sums float32 cannot carry (logits so large that a x + r means
// nothing, or sums that underflow) are read again, in float64.

#if defined(OPERATION_top)
constexpr bool SUMS = false;
#else
constexpr bool SUMS = true;
#endif
#if defined(OPERATION_log_softmax)
constexpr bool WRITES = true;
#else
constexpr bool WRITES = false;
#endif

// Exponents of the top beyond this move the reference.
constexpr double NEAR = 12.0;
// Exponents that float32 cannot tell apart to within NEAR: a x is of no use there.
constexpr double FAR = 67108864.0;
// Sums below this may have lost terms to float32's range.
constexpr double UNDERFLOW = 1e-30;

// Numbers in the state of a part.
constexpr int STATE = 4;

using Vectors = Row<DTYPE_P, VECTOR>;
using Vector = Packed<DTYPE_P, VECTOR>;

// What a thread, a part or a row has added up: S and U over all entries but the top.
struct Sums {
    Top top = {-INFINITY32, 1ll << 62};
    double reference = 0.0;
    double S = 0.0, U = 0.0;

    // 2**(a x + reference) becomes 2**(a x + to).
    DEVICE void refer_to(double to)
    {
        if (S != 0.0) {
            const double h = to - reference, factor = exp2(h);
            U = factor * fma64(h, S, U);
            S = factor * S;
        }
        reference = to;
    }

    // Have the exponent of an entry near 0, if it means anything, with a reference in float32.
    DEVICE void follow(float entry, double a)
    {
        const double exponent = double_of(entry) * a;
        if (fabs(exponent) < FAR)
            refer_to(double_of(float_of(-exponent)));
    }

    // Add the top to the sums, for another takes its place.
    DEVICE void replace_top(Top other, double a)
    {
        if (SUMS && top.value > -INFINITY32) {
            const double z = fma64(double_of(top.value), a, reference), e = exp2(z);
            S += e;
            U = fma64(e, z, U);
        }
        top = other;
    }

    // The same sums seen from the top of all parts: its exponent becomes 0.
    DEVICE void adopt(Top other, double a)
    {
        if (other.index != top.index)
            replace_top(other, a);
        refer_to(-double_of(other.value) * a);
    }
};

// The sums of a thread over the entries that it reads. The first `resident` vectors are kept where
// it finds them again.
DEVICE Sums read(const Vectors& row, float a, Vector* kept, int64 resident)
{
    const int64 vectors = (row.width + row.skew + VECTOR - 1) / VECTOR;
    float x[VECTOR];
    Vector next = row.load<true>(team_rank());
    next.unpack(x);
    Sums sums;
    float bound = largest_of(x);
    const float largest_of_tile = team_larger(bound);
    sums.follow(largest_of_tile, a);
    // Who has it takes it as a top.
    bound = bound == largest_of_tile ? -INFINITY32 : largest_of_tile;
    float reference = float_of(sums.reference);
    bool nan = false;

    for (int64 vector = team_rank(); vector < vectors;) {
        float S = 0.0f, U = 0.0f;
#pragma unroll 1
        for (int n = 0; n < 32 / VECTOR && vector < vectors; ++n, vector += TEAM) {
            const Vector now = next;
            if (vector + TEAM < vectors)
                next = row.load<true>(vector + TEAM);
            if (vector < resident)
                kept[vector] = now;
            now.unpack(x);
            const float largest = largest_of(x);
            if (largest > bound) {
                const int place = place_of(x, largest);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    x[i] = i == place ? -INFINITY32 : x[i];
                sums.S += S;
                sums.U += U;
                S = U = 0.0f;
                sums.replace_top({largest, vector * VECTOR - row.skew + place}, a);
                bound = largest;
                if (SUMS && fabs(fma64(double_of(largest), a, sums.reference)) > NEAR) {
                    sums.follow(largest, a);
                    reference = float_of(sums.reference);
                }
            }
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                if constexpr (SUMS) {
                    const float z = fma32(x[i], a, reference);
                    const float e = exp2_approx(z);
                    S += e;
                    U = fma32(e, larger(z, -200.0f), U);
                } else {
                    nan = nan || x[i] != x[i];
                }
            }
        }
        sums.S += S;
        sums.U += U;
    }
    if (nan)
        sums.S = NAN64;
    return sums;
}

// The sums of all threads, or parts, as one.
DEVICE Sums together(Sums sums, double a)
{
    const Top top = team_top(sums.top);
    sums.adopt(top, a);
    double both[2] = {sums.S, sums.U};
    team_add(both);
    sums.S = both[0];
    sums.U = both[1];
    return sums;
}

// The sums of a whole row, for the block that brings the last part of it; false for the others.
DEVICE bool complete(const Call& call, int64 row, int64 part, double a, Sums& sums)
{
    double* states = call.states + row * call.parts * STATE;
    if (team_rank() == 0) {
        double* state = states + part * STATE;
        state[0] = double_of(sums.top.value);
        state[1] = static_cast<double>(sums.top.index);
        state[2] = sums.S;
        state[3] = sums.U;
    }
    if (!is_last_part(call, row))
        return false;
    sums = Sums();
    for (int64 i = team_rank(); i < call.parts; i += TEAM) {
        const volatile double* state = states + i * STATE;
        Sums other;
        other.top = {float_of(state[0]), static_cast<int64>(state[1])};
        other.reference = -state[0] * a;
        other.S = state[2];
        other.U = state[3];
        const Top top = better(sums.top, other.top);
        sums.adopt(top, a);
        other.adopt(top, a);
        sums.S += other.S;
        sums.U += other.U;
    }
    sums = together(sums, a);
    return true;
}

// S and U of a row in natural units, in float64 from the start.
DEVICE void read_exactly(const Vectors& row, double inverse_temperature, Sums& sums)
{
    double both[2] = {0.0, 0.0};
    for (int64 j = team_rank(); j < row.width; j += TEAM) {
        const float entry = row.entry(j);
        if (entry == -INFINITY32 || j == sums.top.index)
            continue;
        const double w = (double_of(entry) - double_of(sums.top.value)) * inverse_temperature;
        const double e = exp(w);
        both[0] += e;
        both[1] = fma64(e, -w, both[1]);
    }
    team_add(both);
    sums.S = both[0];
    sums.U = both[1];
}

// --- what is written ------------------------------------------------------------------------

// out = (x - top)/T - log_s of one row; the top itself gets -log_s exactly.
template <int DTYPE>
DEVICE void write(const Vectors& row, const Vector* kept, int64 resident, char* out, float inverse,
                  float top, float log_s)
{
    const int64 vectors = (row.width + row.skew + VECTOR - 1) / VECTOR;
    for (int64 vector = team_rank(); vector < vectors; vector += TEAM) {
        float x[VECTOR];
        (vector < resident ? kept[vector] : row.load<false>(vector)).unpack(x);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            x[i] = fma32(x[i] - top, inverse, -log_s);
        Packed<DTYPE, VECTOR> result;
        result.pack(x);
        const int64 first = vector * VECTOR - row.skew, rest = row.width - first;
        result.store(out + first * Entry<DTYPE>::size, first < 0 ? static_cast<int>(-first) : 0,
                     rest < VECTOR ? static_cast<int>(rest) : VECTOR);
    }
}

// The same in float64, or NaN throughout, for any layout.
DEVICE void write_exactly(const Call& call, const Vectors& row, char* out, bool good, double top,
                          double log_s)
{
    const int64 stride = static_cast<int64>(call.parameters[12]);
    for (int64 j = team_rank(); j < call.width; j += TEAM) {
        double value = NAN64;
        if (good)
            value = (double_of(row.entry(j)) - top) * call.p.inverse_temperature - log_s;
        store_as(out + j * stride, call.out_dtype, value);
    }
}

// The results of one row: NaN where it is not a distribution.
DEVICE void finish_row(const Call& call, int64 number, const Vectors& row, const Vector* kept,
                       int64 resident, float a, Sums sums)
{
    const double inverse = call.p.inverse_temperature;
    const double top = double_of(sums.top.value);
    bool good = fabs(top) < INFINITY64;
    const bool narrow = fabs(top * a) < FAR && sums.S >= UNDERFLOW;
    sums.U *= -LOG_OF_2;
    if (SUMS && good && !narrow)
        read_exactly(row, inverse, sums);
    good = good && sums.S == sums.S;
    if constexpr (WRITES) {
        char* out = call.out;
        out += call.out_offsets ? call.out_offsets[number] : number * call.out_stride;
        const int size = call.out_dtype == FLOAT32 ? 4 : 2;
        const double log_s = log1p(sums.S);
        if (!good || !narrow || call.out_dtype == FLOAT64 || call.parameters[12] != size)
            write_exactly(call, row, out, good, top, log_s);
        else if (call.out_dtype == FLOAT32)
            write<FLOAT32>(row, kept, resident, out, inverse, sums.top.value, log_s);
        else if (call.out_dtype == FLOAT16)
            write<FLOAT16>(row, kept, resident, out, inverse, sums.top.value, log_s);
        else
            write<BFLOAT16>(row, kept, resident, out, inverse, sums.top.value, log_s);
    } else if (team_rank() == 0) {
        double* values = call.values + number * call.columns;
        values[0] = good ? top * inverse : NAN64;
        values[1] = good ? sums.S : NAN64;
        values[2] = good ? sums.U : NAN64;
        values[3] = good ? static_cast<double>(sums.top.index) : NAN64;
        const int64 token = good && call.tokens ? call.tokens[number] : -1;
        values[4] = token >= 0 && token < row.width
                        ? (double_of(row.entry(token)) - top) * inverse
                        : NAN64;
    }
}

KERNEL(THREADS, BLOCKS) single_pass(const Call call)
{
    const float a = float_of(call.p.inverse_temperature * LOG2_OF_E);
    const int64 resident = WRITES && call.parts == 1 ? call.resident / VECTOR : 0;
    Vector* kept = reinterpret_cast<Vector*>(kernel_shared()) + team_in_block() * resident;
    const int64 step = block_count() * TEAMS, items = call.count * call.parts;
    for (int64 item = block_index() * TEAMS + team_in_block(); item < items; item += step) {
        const int64 number = item / call.parts, part = item % call.parts;
        const char* address = row_address(call.p, number);
        const Vectors row(address, call.width, Vectors::skew_of(address));
        Sums sums;
        if (is_read(call, number)) {
            Vectors piece = row;
            const int64 first = part * call.part_width;
            if (call.parts > 1) {
                const int64 rest = call.width - first;
                piece.address += first * Entry<DTYPE_P>::size;
                piece.width = rest < call.part_width ? rest : call.part_width;
            }
            sums = together(read(piece, a, kept, resident), a);
            if (call.parts > 1) {
                sums.top.index += first;
                if (!complete(call, number, part, a, sums))
                    continue;
            }
        } else if (part > 0) {
            continue;
        }
        finish_row(call, number, row, kept, resident, a, sums);
    }
}
