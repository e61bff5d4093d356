// KL divergence, both ways round or one, Renyi divergence and cross-entropy: one read of two rows.
//
// parameters[0] is beta, the order of Renyi less 1, parameters[1] the largest log-ratio that it
// takes. OPERATION_kl_both writes two columns, all others one. Rows that float32 sums do not carry
// are marked UNFINISHED.
//
// With a constant c, t = (y - x) + c, e = exp(x - m) for the largest entry m of x, and
// phi(t) = exp(t) - 1 - t >= 0, the sums are
//
//     S = sum e,  D = sum e t,  B = sum e phi(t),
//
// and G, which depends on the operation: sum e phi(-beta t) for Renyi, e psi(t) for both KL with
// psi(t) = 1 - exp(t) + t exp(t) >= 0, e log2(e) for the cross-entropy. Then A = (B + D)/S =
// E_p[expm1(t)], the normalizers differ by logsumexp(x) - logsumexp(y) = c - log1p(A), and
//
//     KL = E_p[exp(-d) - 1 + d] = B/S - (A - log1p(A)),
//
// two terms that are each >= 0, of which the second is of second order in the distance of c from
// the mean of x - y. For Renyi, with C = E_p[expm1(-beta t)] = G/S - beta D/S,
//
//     log sum p^alpha q^(1-alpha) = beta B/S + G/S - beta (A - log1p(A)) - (C - log1p(C)).
//
// The cross-entropy is the entropy of P plus KL. KL(Q, P) is G/S' less the excess of
// A' = E_q[expm1(-t)] = -(D + B)/S', S' = S + D + B.
//
// Each thread has sums, a c and a reference for m of its own, float32 for 32 entries at a time. It
// keeps its *top*, the largest entry that it has seen, apart, so that nothing is lost when one
// symbol has nearly all the mass: the rest is small, and summed among its equals. E adds up what
// rounding errors are in proportion to: whatever went into B (F: into Renyi's G), and half of what
// moving c multiplies D with, whose terms are more exact. (Errors of e are nothing but slightly
// different weights.) They enter the result as E/(S (1 + A)) and F/(S (1 + C) beta) do.

#if defined(OPERATION_renyi)
constexpr bool RENYI = true;
#else
constexpr bool RENYI = false;
#endif
#if defined(OPERATION_cross_entropy)
constexpr bool CROSS = true;
#else
constexpr bool CROSS = false;
#endif
#if defined(OPERATION_kl_both)
constexpr bool BOTH = true;
#else
constexpr bool BOTH = false;
#endif

// Exponents of the top beyond this move the reference.
constexpr double NEAR = 12.0;
// Exponents that float32 cannot tell apart to within NEAR: a x is of no use there.
constexpr double FAR = 67108864.0;
// Results below this may have lost terms to float32's range.
constexpr double UNDERFLOW = 1e-30;
// E may be this much larger than the result: errors of terms are below 1.2e-7, those of results must
// be below 2e-6. (Of a Renyi divergence of order 1/2 it is 2.5 times as large at best, and E of both
// KL holds two sums.)
constexpr double CANCELLATION = 16.0;
// Rows that differ by more than this, or by more than that where y - x is rounded, are left alone.
constexpr double APART = 1000.0, CLOSE = 16.0;

// Vectors whose sums are added up in float32, of each of which they are taken apart.
constexpr int MANY = 8;

// Vectors of each row that a thread has asked for and not read.
constexpr int AHEAD = 4;

// Numbers in the state of a part.
constexpr int STATE = 12;

// Sums of a few entries in float32, in base 2: D, B and G over log 2.
struct Few {
    float S = 0.0f, D = 0.0f, B = 0.0f, G = 0.0f;
    float high = -INFINITY32, low = INFINITY32;  // of t

    // Those of a vector.
    DEVICE void add(float of_S, float of_D, float of_B, float of_G)
    {
        S += of_S;
        D += of_D;
        B += of_B;
        G += of_G;
    }
};

// What exponents are of: e = 2**(a x + reference), t = a (y - x) + c.
struct Exponents {
    float a, reference, c, beta;
    float near;  // the largest |t| of terms that need no reduction

    DEVICE Exponents(float a, float beta)
        : a(a), reference(0.0f), c(0.0f), beta(beta),
          near(RENYI ? NEAR_ONE / larger(1.0f, fabs(beta)) : NEAR_ONE)
    {
    }

    // EXACTLY carries along what the subtraction y - x and the exponent of e round off.
    template <bool EXACTLY>
    DEVICE float weight(float x) const
    {
        return EXACTLY ? exp2_exactly(x, a, reference) : exp2_approx(fma32(x, a, reference));
    }
    template <bool EXACTLY>
    DEVICE float ratio(float x, float y) const
    {
        if constexpr (!EXACTLY)
            return fma32(y - x, a, c);
        const Difference32 d(y, x);
        return fma32(d.lost, a, fma32(d.value, a, c));
    }
    DEVICE float exponent(float x) const { return larger(fma32(x, a, reference), -200.0f); }
    // What entries beyond `x` weigh at least, however they are rounded.
    DEVICE float weight_below(float x) const { return 0.9999f * weight<false>(x); }
};

// The weights of the entries of a vector and their log-ratios.
struct Weighted {
    float e[VECTOR], t[VECTOR];
    float S;    // sum of e
    float far;  // the largest |t|, or NaN

    template <bool EXACTLY>
    DEVICE void weigh(const Exponents& of, const float (&x)[VECTOR])
    {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            e[i] = of.weight<EXACTLY>(x[i]);
            S = i ? S + e[i] : e[i];
        }
    }
    template <bool EXACTLY>
    DEVICE void compare(const Exponents& of, const float (&x)[VECTOR], const float (&y)[VECTOR])
    {
        far = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            t[i] = of.ratio<EXACTLY>(x[i], y[i]);
            far = larger_or_nan(far, fabs(t[i]));
        }
    }
};

// Add entries to the sums of which no |t| is beyond `near`.
DEVICE void add_near(Few& few, const Exponents& of, const Weighted& entries,
                     const float (&x)[VECTOR])
{
    float D = 0.0f, B = 0.0f, G = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float t = entries.t[i], once = entries.e[i] * t, twice = once * t;
        D += once;
        B = fma32(twice, near_phi(t), B);
        if constexpr (BOTH)
            G = fma32(twice, near_psi(t), G);
        if constexpr (RENYI)
            G = fma32(twice, near_phi(t * -of.beta), G);
        if constexpr (CROSS)
            G = fma32(entries.e[i], of.exponent(x[i]), G);
    }
    few.add(entries.S, D, B, RENYI ? of.beta * of.beta * G : G);
    few.high = larger(few.high, entries.far);
    few.low = smaller(few.low, -entries.far);
}

// The same for any t. -inf in x alone or in y alone makes sums NaN or infinite.
DEVICE void add(Few& few, const Exponents& of, const Weighted& entries, const float (&x)[VECTOR])
{
    float D = 0.0f, B = 0.0f, G = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float e = entries.e[i], t = entries.t[i];
        const Power power(t);
        D = fma32(e, t, D);
        B = fma32(e, power.phi, B);
        few.high = larger(few.high, t);
        if constexpr (BOTH)
            G = fma32(e, power.psi, G);
        if constexpr (CROSS)
            G = fma32(e, of.exponent(x[i]), G);
        if constexpr (RENYI) {
            few.low = smaller(few.low, t);
            G = fma32(e, phi(t * -of.beta), G);
        }
    }
    few.add(entries.S, D, B, G);
}

// What a thread, a part or a row has added up, but for the top. D, B and the G of divergences are
// in natural units, all exponents in base 2.
struct Sums {
    Top top = {-INFINITY32, 1ll << 62};
    float top_y = 0.0f;      // the entry of the other row there
    double reference = 0.0;  // e = 2**(a x + reference)
    double c = 0.0;          // t = a (y - x) + c
    double S = 0.0, D = 0.0, B = 0.0, G = 0.0;
    double E = 0.0, F = 0.0; // what errors are in proportion to: those of B, and of Renyi's G
    float high = -INFINITY32, low = INFINITY32;  // of a (y - x)

    DEVICE void add(const Few& few, double beta)
    {
        high = larger(high, few.high - float_of(c));
        if (RENYI)
            low = smaller(low, few.low - float_of(c));
        if (few.high > FARTHEST)
            S = NAN64;
        S += few.S;
        D = fma64(few.D, LOG_OF_2, D);
        B = fma64(few.B, LOG_OF_2, B);
        G = CROSS ? G + few.G : fma64(few.G, LOG_OF_2, G);
        E = fma64(few.B, LOG_OF_2, E);
        if (BOTH)
            E = fma64(few.G, LOG_OF_2, E);
        if (RENYI)
            F = fma64(few.G, LOG_OF_2, F);
    }

    // One entry with weight e = 2**z and log-ratio t.
    DEVICE void add(double z, double t, double beta)
    {
        const double e = exp2_called(z);
        const Exponential exponential(smaller(t, 700.0));
        S += e;
        D = fma64(e, t, D);
        B = fma64(e, exponential.tail, B);
        if (CROSS)
            G = fma64(e, z, G);
        double g = 0.0;
        if (RENYI)
            g = exponential_tail(smaller(-beta * t, 700.0));
        if (BOTH)
            g = t < -1.0 ? 1.0 - exponential.whole * (1.0 - t)
                         : t * exponential.less_1 - exponential.tail;
        if (RENYI || BOTH)
            G = fma64(e, g, G);
        E = fma64(e, exponential.tail + (BOTH ? g : 0.0), E);
        if (RENYI)
            F = fma64(e, g, F);
    }

    DEVICE double ratio_of_top(double a) const
    {
        return fma64(double_of(top_y) - double_of(top.value), a, c) * LOG_OF_2;
    }

    // The same sums with another reference.
    DEVICE void refer_to(double to)
    {
        if (S != 0.0) {
            const double h = to - reference, factor = exp2_called(h);
            G = factor * (CROSS ? fma64(h, S, G) : G);
            S *= factor;
            D *= factor;
            B *= factor;
            E *= factor;
            F *= factor;
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

    // The same sums with another c: t becomes t + h.
    DEVICE void move_to(double to, double beta)
    {
        if (S != 0.0) {
            const double h = (to - c) * LOG_OF_2;
            const Exponential by(smaller(h, 700.0));
            const double linear = by.less_1 * D;
            E = fma64(by.whole, E, 0.5 * fabs(linear));
            if (BOTH) {
                E += by.whole * fabs(h) * (0.5 * fabs(D) + B);
                G = by.whole * fma64(h, S + D + B, G) - by.less_1 * S;
            }
            B = fma64(by.whole, B, linear) + by.tail * S;
            if (RENYI) {
                const Exponential back(smaller(-beta * h, 700.0));
                const double linear = -back.less_1 * beta * D;
                F = fma64(back.whole, F, 0.5 * fabs(linear));
                G = fma64(back.whole, G, linear) + back.tail * S;
            }
            D = fma64(h, S, D);
        }
        c = to;
    }

    // Add the top to the sums, for another takes its place.
    DEVICE void replace_top(Top other, float other_y, double a, double beta)
    {
        if (top.value > -INFINITY32)
            add(fma64(double_of(top.value), a, reference), ratio_of_top(a), beta);
        top = other;
        top_y = other_y;
    }

    // The same sums seen from the top of all parts: its exponent becomes 0.
    DEVICE void adopt(Top other, float other_y, double a, double beta)
    {
        if (other.index != top.index)
            replace_top(other, other_y, a, beta);
        refer_to(-double_of(other.value) * a);
    }
};

// A first guess at the c of a row: minus the mean of y - x over the first vectors, weighted.
DEVICE float guess(const float (&x)[VECTOR], const float (&y)[VECTOR], float a, float largest)
{
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float d = (y[i] - x[i]) * a, e = exp2_approx((x[i] - largest) * a);
        if (fabs(d) < 1e6f) {
            sums[0] += e;
            sums[1] = fma32(e, d, sums[1]);
        }
    }
    team_add(sums);
    return sums[0] > 0.0f ? -sums[1] / sums[0] : 0.0f;
}

// log2(e)/T: what entries are multiplied with; and the order of Renyi less 1.
DEVICE float factor(const Call& call) { return float_of(call.p.inverse_temperature * LOG2_OF_E); }
DEVICE float order(const Call& call) { return float_of(call.parameters[0]); }

// The sums of a thread over the entries that it reads of a part of a row.
template <bool EXACTLY>
OUTLINED Sums read(const Call& call, int64 number, int64 part)
{
    const float a = factor(call), beta = order(call);
    const int64 first = part * call.part_width, rest = call.width - first;
    const PairOfRows rows(call, number, first,
                          call.parts > 1 && rest > call.part_width ? call.part_width : rest);
    // A ring of places for each thread, of which the one that has been read is filled next.
    constexpr int RING = (AHEAD + 1) * THREADS;
    const Room room(kernel_shared(), RING);
    const int last = AHEAD * THREADS;
    int place = thread_index();
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        rows.copy(team_rank() + i * TEAM, room, place + i * THREADS);
        end_batch();
    }
    await_batches<AHEAD - 1>();
    float x[VECTOR], y[VECTOR];
    room.unpack(place, x, y);
    Sums sums;
    float bound = largest_of(x);
    const float largest_of_tile = team_larger(bound);
    sums.follow(largest_of_tile, a);
    Exponents of(a, beta);
    of.c = guess(x, y, a, largest_of_tile);
    sums.c = of.c;
    // Who has it takes it as a top.
    bound = bound == largest_of_tile ? -INFINITY32 : largest_of_tile;
    of.reference = float_of(sums.reference);
    float weight_of_bound = of.weight_below(bound);

    // All threads of a warp go on until the last of them has nothing left: beyond the row is -inf.
    const int stop = rows.vectors + thread_index() % 32;
    for (int vector = team_rank(); vector < stop;) {
        Few few;
        const int pause = vector + MANY * TEAM < stop ? vector + MANY * TEAM : stop;
#pragma unroll 1
        for (; vector < pause; vector += TEAM, place = place < last ? place + THREADS : place - last) {
            await_batches<AHEAD - 1>();
            room.unpack(place, x, y);
            const int before = place - THREADS;
            rows.copy(vector + AHEAD * TEAM, room, before < 0 ? before + RING : before);
            end_batch();
            Weighted entries;
            entries.weigh<EXACTLY>(of, x);
            // Where they weigh no more than the bound together, none is beyond it.
            if (!(entries.S <= weight_of_bound)) {
                const float largest = largest_of(x);
                if (largest > bound) {
                    const int at = place_of(x, largest);
                    float other = 0.0f;
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i)
                        other = i == at ? y[i] : other;
                    sums.add(few, beta);
                    few = Few();
                    sums.replace_top({largest, first + rows.index(vector) + at}, other, a, beta);
                    bound = largest;
                    if (fabs(fma64(double_of(largest), a, sums.reference)) > NEAR) {
                        sums.follow(largest, a);
                        of.reference = float_of(sums.reference);
                    }
                    weight_of_bound = of.weight_below(bound);
                    // Registers have had more to do than to keep these.
                    room.unpack(place, x, y);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) {
                        x[i] = i == at ? -INFINITY32 : x[i];
                        y[i] = i == at ? -INFINITY32 : y[i];
                    }
                    entries.weigh<EXACTLY>(of, x);
                }
            }
            entries.compare<EXACTLY>(of, x, y);
            if (!warp_any(!(entries.far <= of.near))) {
                add_near(few, of, entries, x);
                continue;
            }
            if (!(entries.far < INFINITY32)) {
                // What is -inf in both rows has no weight.
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    entries.t[i] = x[i] == -INFINITY32 && y[i] == -INFINITY32 ? 0.0f : entries.t[i];
            }
            add(few, of, entries, x);
        }
        sums.add(few, beta);
        if (sums.D * sums.D > sums.B * sums.S) {
            // Half of B or more comes from a c that is off the mean of x - y.
            of.c = float_of(sums.c - sums.D / sums.S * LOG2_OF_E);
            sums.move_to(of.c, beta);
        }
    }
    await_batches<0>();
    return sums;
}

// The sums of all threads, or parts, as one.
OUTLINED Sums together(const Call& call, Sums sums)
{
    const double a = factor(call), beta = order(call);
    const Top top = team_top(sums.top);
    const float top_y = team_add(sums.top.index == top.index ? sums.top_y : 0.0f);
    sums.adopt(top, top_y, a, beta);
    // c where it leaves least of B: minus the mean of y - x.
    double mean[2] = {sums.S, fma64(sums.D, -LOG2_OF_E, sums.S * sums.c)};
    team_add(mean);
    const double of_top = (double_of(top.value) - double_of(top_y)) * a;
    sums.move_to((mean[1] + of_top) / (mean[0] + 1.0), beta);
    double all[6] = {sums.S, sums.D, sums.B, sums.G, sums.E, sums.F};
    team_add(all);
    sums.S = all[0];
    sums.D = all[1];
    sums.B = all[2];
    sums.G = all[3];
    sums.E = all[4];
    sums.F = all[5];
    float range[2] = {sums.high, -sums.low};
    team_join<Larger>(range);
    sums.high = range[0];
    sums.low = -range[1];
    return sums;
}

// Leave the sums of a part where others find them.
DEVICE void store(const Call& call, int64 row, int64 part, const Sums& sums)
{
    if (team_rank() == 0) {
        double* state = call.states + (row * call.parts + part) * STATE;
        state[0] = double_of(sums.top.value);
        state[1] = static_cast<double>(sums.top.index);
        state[2] = double_of(sums.top_y);
        state[3] = sums.c;
        state[4] = sums.S;
        state[5] = sums.D;
        state[6] = sums.B;
        state[7] = sums.G;
        state[8] = sums.E;
        state[9] = double_of(sums.high);
        state[10] = double_of(sums.low);
        state[11] = sums.F;
    }
}

// The sums of a row from those of its parts.
OUTLINED Sums of_parts(const Call& call, int64 row)
{
    const double a = factor(call), beta = order(call);
    const double* states = call.states + row * call.parts * STATE;
    Sums sums;
    for (int64 i = team_rank(); i < call.parts; i += TEAM) {
        const volatile double* state = states + i * STATE;
        const Top other = {float_of(state[0]), static_cast<int64>(state[1])};
        if (better(sums.top, other).index == other.index) {
            sums.top = other;
            sums.top_y = float_of(state[2]);
            sums.c = state[3];
        }
    }
    sums.reference = -double_of(sums.top.value) * a;
    for (int64 i = team_rank(); i < call.parts; i += TEAM) {
        const volatile double* state = states + i * STATE;
        Sums other;
        other.top = {float_of(state[0]), static_cast<int64>(state[1])};
        other.top_y = float_of(state[2]);
        other.reference = -state[0] * a;
        other.c = state[3];
        other.S = state[4];
        other.D = state[5];
        other.B = state[6];
        other.G = state[7];
        other.E = state[8];
        other.F = state[11];
        other.adopt(sums.top, sums.top_y, a, beta);
        other.move_to(sums.c, beta);
        sums.S += other.S;
        sums.D += other.D;
        sums.B += other.B;
        sums.G += other.G;
        sums.E += other.E;
        sums.F += other.F;
        sums.high = larger(sums.high, float_of(state[9]));
        sums.low = smaller(sums.low, float_of(state[10]));
    }
    return together(call, sums);
}

struct Values {
    double value, other;
};

// What the sums of a row are worth: UNFINISHED where they do not carry it.
OUTLINED Values values_of(const Call& call, Sums sums, bool exactly)
{
    const double a = factor(call), beta = order(call), limit = call.parameters[1] * LOG2_OF_E;
    bool good = sums.high + sums.c <= limit;
    if (RENYI)
        good = good && (sums.low + sums.c) * fabs(beta) >= -limit;
    double entropy = log1p_called(sums.S);
    const double rest = sums.S;
    if (CROSS)
        entropy += sums.G * -LOG_OF_2 / (1.0 + rest);
    sums.add(0.0, sums.ratio_of_top(a), beta);
    const double S = sums.S, c = sums.c * LOG_OF_2, A = (sums.B + sums.D) / S;
    // For large A or C, where it cancels, what is the same without B or G.
    const double ratio = log1p_called(A);
    double value = A > 1.0 ? ratio - sums.D / S : sums.B / S - (A - ratio);
    // Where the rows differ by a constant c, the rounding of y - x makes errors of c 2**-24 in t,
    // which average out over the S or more symbols that carry the mass. The top's own t is exact:
    // of a row where it has nearly all, the errors are beside the t of the others, whose square is
    // about the value over their mass.
    const double noise =
        exactly ? 0.0 : fabs(c) > CLOSE ? INFINITY64 : c * c * smaller(1.0, rest) / (100.0 * S);
    double other = 0.0;
    if (BOTH) {
        const double total = S + sums.D + sums.B;
        const double back = -A / (1.0 + A);
        other = sums.G / total - (A > 1.0 ? back + ratio : excess(back));
        good = good && sums.E <= CANCELLATION * other * total && noise <= other;
    }
    if (CROSS)
        value += entropy;
    double error = sums.E / (S * (1.0 + A));
    if (RENYI) {
        const double C = (sums.G - beta * sums.D) / S;
        value += (C > 1.0 ? log1p_called(C) + beta * sums.D / S : sums.G / S - excess(C)) / beta;
        error += sums.F / (S * (1.0 + C) * fabs(beta));
    }
    good = good && error <= CANCELLATION * value && noise <= value && fabs(c) < APART;
    if (!good || !(value < INFINITY64))
        return {UNFINISHED, UNFINISHED};
    return {larger(value, 0.0), larger(other, 0.0)};
}

KERNEL(THREADS, BLOCKS) one_pass(ARGUMENT Call call)
{
    // Sums of entries of 32 bits carry along what is rounded off; those of 16, whose differences
    // are nearly always exact, only where that is not enough.
    constexpr bool WIDE = Entry<DTYPE_P>::size == 4 && Entry<DTYPE_Q>::size == 4;
    for (int64 item = block_index() * TEAMS + team_in_block(); item < call.count * call.parts;
         item += block_count() * TEAMS) {
        const int64 number = item / call.parts, part = item % call.parts;
        Values values = {NAN64, NAN64};
        if (is_read(call, number)) {
            bool mine = true;  // whether this team finishes the row
            for (bool exactly = WIDE || call.parts > 1;; exactly = true) {
                Sums sums = exactly ? read<true>(call, number, part) : read<false>(call, number, part);
                sums = together(call, sums);
                if (call.parts > 1) {
                    store(call, number, part, sums);
                    mine = is_last_part(call, number);
                    if (!mine)
                        break;
                    sums = of_parts(call, number);
                }
                values = values_of(call, sums, exactly);
                if (exactly || !is_unfinished(values.value))
                    break;
            }
            if (!mine)
                continue;
            const double least = BOTH ? smaller(values.value, values.other) : values.value;
            if (least < UNDERFLOW && PairOfRows(call, number, 0, call.width).differ())
                values = {UNFINISHED, UNFINISHED};
        }
        if (team_rank() == 0) {
            double* results = call.values + number * call.columns;
            results[0] = values.value;
            if (BOTH)
                results[1] = values.other;
        }
    }
}
