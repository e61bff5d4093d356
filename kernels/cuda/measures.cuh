// The second phase: sums over a pair of rows whose normalizers are known, and what they are worth.
//
// parameters[i] is that of term i, beta for Renyi divergences. Results that float32 does not carry
// are marked UNFINISHED in their first column.
//
// Where p and q differ little, terms of t = log2(q/p) = a (y - x) + C are small to the extent that
// C = ky - kx is right, whose error is that of two large sums: delta. But in the second phase it
// shows, as D = sum (q - p), from terms that vanish where the rows agree. Divergences are off by
// delta**2/2 and the like, which is taken away; where it is much of them, D corrects C, and terms
// are summed again. All sums are symmetric in the two rows or change sign only, operation by
// operation, so that swapping the arguments of symmetric divergences changes no bit.

#pragma once

// Sums and results below this may have lost terms to float32's range.
constexpr double UNDERFLOW = 1e-30;
// What delta is at most unless it is measured, and what share of a result may come from it.
constexpr double DELTA = 2e-6, SHARE = 1e-3;
// The largest log-ratio, times the order, of which float32 holds the exponential to 1e-6.
constexpr double LARGEST_RATIO = 20.0;

// The sums of a row, and after them the largest |t|, lie in shared memory, as do its constants.
constexpr int NUMBERS = SUMS + 1;
static_assert(8 * NUMBERS <= EXCHANGE / 3, "sums beyond their place in shared memory");
DEVICE double* row_sums(const Call& call) { return team_exchange(call) + EXCHANGE / 24; }

// Put them there, from what each thread has of them.
DEVICE void put_together(const Call& call, const double (&sums)[SUMS], double high)
{
    double* here = CLUSTER > 1 ? team_exchange(call) : row_sums(call);
    constexpr int AT_ONCE = 8;
    team_barrier();
#pragma unroll
    for (int first = 0; first < SUMS; first += AT_ONCE) {
        double some[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            some[i] = first + i < SUMS ? sums[first + i] : 0.0;
        team_add(some);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (team_rank() == 0 && first + i < SUMS)
                here[first + i] = some[i];
        }
    }
    high = team_larger(high);
    if (team_rank() == 0)
        here[SUMS] = high;
    if constexpr (CLUSTER > 1) {
        cluster_barrier();
        for (int i = team_rank(); i < NUMBERS; i += TEAM) {
            double total = 0.0;
            for (int rank = 0; rank < CLUSTER; ++rank) {
                const double other = *in_block(here + i, rank);
                total = i < SUMS ? total + other : larger(total, other);
            }
            row_sums(call)[i] = total;
        }
        cluster_barrier();
    } else {
        team_barrier();
    }
}

// What terms of a row depend on: log2 p = a x + kx, log2 q = a y + ky, t = log2(q/p) = a (y - x) + C.
// EXACTLY carries along what y - x rounds off and the constants leave; without it the one counts as
// noise, and of the others C's is in delta.
template <bool EXACTLY>
struct Exponents {
    float a;
    Split kx, ky, c;
    float beta[COUNT];
    float near;  // the largest |t| of entries that are added as near ones

    DEVICE Exponents(const Call& call, const Constants& constants)
        : a(factor(call)), kx(constants.of_x.k), ky(constants.of_y.k), c(constants.C),
          near(NEAR_BOTH)
    {
        find_orders<0>(call);
    }

    // Term by term: on the device, TERM has values but is no array in memory.
    template <int I>
    DEVICE void find_orders(const Call& call)
    {
        beta[I] = float_of(call.parameters[I]);
        if constexpr (is_summed(SUM_RENYI + I))
            near = smaller(near, NEAR_ONE / larger(1.0f, fabs(beta[I])));
        if constexpr (I + 1 < COUNT)
            find_orders<I + 1>(call);
    }

    DEVICE float log_p(float x) const { return log_of(x, kx); }
    DEVICE float log_q(float y) const { return log_of(y, ky); }
    DEVICE float log_of(float x, const Split& k) const
    {
        const float log = fma32(x, a, k.whole);
        return EXACTLY ? log + k.rest : log;
    }
    // log2 of sqrt(p q), the same bits if p and q change places.
    DEVICE float log_mean(float x, float y) const
    {
        const float u = fma32(x, 0.5f * a, 0.5f * kx.whole), v = fma32(y, 0.5f * a, 0.5f * ky.whole);
        return EXACTLY ? u + v + 0.5f * (kx.rest + ky.rest) : u + v;
    }
    // NaN for entries that are -inf in both rows.
    DEVICE float ratio(float x, float y) const
    {
        if constexpr (!EXACTLY)
            return fma32(y - x, a, c.whole);
        const Difference32 d(y, x);
        // What is lost is NaN where the difference is infinite.
        return fma32(d.value, a, c.whole) + fma32(larger(d.lost, -1e30f), a, c.rest);
    }
};

// Sums of a few entries in float32, of which those of divergences of near rows are, in part, taken
// apart: SUM_KL and SUM_REVERSE are log(2)/2 even + odd and log(2)/2 even - odd more.
struct Few {
    float sum[SUMS] = {};
    float even = 0.0f, odd = 0.0f;

    template <int SUM>
    DEVICE void add(float term)
    {
        if constexpr (is_summed(SUM))
            sum[PLACE<SUM>] += term;
    }
    template <int SUM>
    DEVICE void add(float a, float b)
    {
        if constexpr (is_summed(SUM))
            sum[PLACE<SUM>] = fma32(a, b, sum[PLACE<SUM>]);
    }
};

// Renyi divergences of an entry with p, q and t; where rows are near, of which p and q come times
// t**2.
template <int I, bool NEAR>
DEVICE void add_renyi(Few& few, float p, float q, float t, const float (&beta)[COUNT])
{
    if constexpr (is_summed(SUM_RENYI + I)) {
        constexpr bool REVERSE = TERM[I] == REVERSE_RENYI;
        const float exponent = REVERSE ? beta[I] * t : -beta[I] * t;
        if constexpr (NEAR)
            few.add<SUM_RENYI + I>((REVERSE ? q : p) * (beta[I] * beta[I]), near_phi(exponent));
        else
            few.add<SUM_RENYI + I>(REVERSE ? q : p, phi(smaller(exponent, FARTHEST)));
    }
    if constexpr (I + 1 < COUNT)
        add_renyi<I + 1, NEAR>(few, p, q, t, beta);
}

constexpr bool HAS_KL = is_summed(SUM_KL), HAS_REVERSE = is_summed(SUM_REVERSE);
constexpr bool HAS_RENYI = has(RENYI) || has(REVERSE_RENYI);
// JS and the like alone do without knowing delta, unless they are to be exact.
template <bool EXACTLY>
constexpr bool MEASURES = DIVERGES && (EXACTLY || !SECOND_ORDER);

// Below this delta may change the sign of t.
constexpr float UNSURE = static_cast<float>(2.0 * DELTA);
DEVICE void add_sign(Few& few, float mean, float t)
{
    if (fabs(t) < UNSURE)
        few.add<SUM_NEAR>(mean);
    else
        few.add<SUM_V>(sign_of(mean, t));
}

// What else is done with q - p of every entry, over UNIT, while terms are summed: nothing.
struct Nothing {
    DEVICE Nothing(const Call&, const Share&, const Piece&, float) {}
    DEVICE void see(int, float) {}
    DEVICE void end(int) {}
    DEVICE float result() const { return 0.0f; }
};

// Add an entry whose |t| is at most `near`: seen from sqrt(p q), which is returned; see
// mathematics.cuh. Not what depends on the sign of t.
template <bool EXACTLY, class ALSO>
DEVICE float add_near(Few& few, const Exponents<EXACTLY>& of, float x, float y, float t, ALSO& also,
                      int i)
{
    const float s = t * t, g = exp2_approx(of.log_mean(x, y)), gt = g * t;
    if constexpr (MEASURES<EXACTLY> || is_summed(SUM_H) || is_summed(SUM_JEFFREYS) ||
                  HAS_KL || HAS_REVERSE) {
        const float d = gt * near_difference<NEEDS_BOTH>(s);
        if constexpr (MEASURES<EXACTLY>)
            few.add<SUM_D>(d);
        also.see(i, d);
        few.add<SUM_H>(fabs(d));
        few.add<SUM_JEFFREYS>(d, t);
        if constexpr (HAS_KL || HAS_REVERSE) {
            few.even = fma32(d, t, few.even);
            few.odd = fma32(gt * s, near_skewness(s), few.odd);
        }
    }
    if constexpr (is_summed(SUM_HELLINGER2))
        few.add<SUM_HELLINGER2>(gt * t, near_hellinger2(s));
    if constexpr (is_summed(SUM_JS))
        few.add<SUM_JS>(gt * t, near_js(s));
    if constexpr (HAS_RENYI) {
        const float p = exp2_approx(of.log_p(x)), q = exp2_approx(of.log_q(y));
        add_renyi<0, true>(few, p * s, q * s, t, of.beta);
    }
    return g;
}

// Add an entry with any t: M k(tau), with M the larger one of p and q. Not that of JS: its M and tau.
template <bool EXACTLY, class ALSO>
DEVICE void add_far(Few& few, const Exponents<EXACTLY>& of, float x, float y, float t, float& m,
                    float& tau, ALSO& also, int i)
{
    constexpr bool ONLY_H = !NEEDS_BOTH;
    const float u = of.log_p(x), v = of.log_q(y);
    // Entries that are -inf in both rows have m = 0 and any tau.
    tau = smaller(fabs(t), FARTHEST);
    m = exp2_approx(larger(u, v));
    const Power power(-tau);  // the smaller one over the larger one
    const float mh = m * (ONLY_H ? one_minus_exp2(tau) : -power.less_1);
    if constexpr (MEASURES<EXACTLY>)
        few.add<SUM_D>(sign_of(mh, t));
    also.see(i, sign_of(mh, t));
    const bool q_is_larger = t > 0.0f;
    few.add<SUM_KL>(m, q_is_larger ? power.psi : power.phi);
    few.add<SUM_REVERSE>(m, q_is_larger ? power.phi : power.psi);
    few.add<SUM_H>(mh);
    if constexpr (is_summed(SUM_V))
        add_sign(few, fma32(mh, static_cast<float>(-0.5 * UNIT), m), t);
    few.add<SUM_JEFFREYS>(mh, tau);
    if constexpr (is_summed(SUM_HELLINGER2)) {
        const float root = one_minus_exp2(0.5f * tau);
        few.add<SUM_HELLINGER2>(m * root, root);
    }
    if constexpr (HAS_RENYI) {
        const float less = m * power.whole;
        add_renyi<0, false>(few, q_is_larger ? less : m, q_is_larger ? m : less, sign_of(tau, t),
                            of.beta);
    }
}

// Add what describes P, or Q, of a vector: the sums of probabilities with their logarithms, but for
// the entry `hole`, if that is one of these.
template <bool EXACTLY, bool OF_Q>
DEVICE void add_row(Few& few, const Exponents<EXACTLY>& of, const float (&x)[VECTOR], int64 hole)
{
    const bool whole = hole < 0 || hole >= VECTOR;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        float log = OF_Q ? of.log_q(x[i]) : of.log_p(x[i]);
        if (!whole)
            log = i == hole ? -INFINITY32 : log;
        const float p = exp2_approx(log);
        few.add<OF_Q ? SUM_Q : SUM_P>(p);
        few.add<OF_Q ? SUM_Q_LOG_Q : SUM_P_LOG_P>(p, larger(log, -200.0f));
    }
}

// Sum the terms of a row.
template <bool EXACTLY, class ALSO = Nothing>
OUTLINED float sum_terms(const Call& call, Share share, float given = 0.0f)
{
    const Piece piece(call, share);
    const Constants& constants = row_constants(call);
    const Exponents<EXACTLY> of(call, constants);
    // Where the largest entries are, which sums of single rows leave out.
    const int64 top_p = constants.of_x.top.index - share.first + piece.rows.skew;
    const int64 top_q = constants.of_y.top.index - share.first + piece.rows.skew;
    double sums[SUMS] = {};
    float high = 0.0f;
    ALSO also(call, share, piece, given);

    // All threads of a warp go on until the last of them has nothing left: beyond the row is -inf.
    const int stop = piece.rows.vectors + thread_index() % 32;
    for (int vector = team_rank(); vector < stop;) {
        Few few;
        const int pause = vector + BLOCK * TEAM < stop ? vector + BLOCK * TEAM : stop;
#pragma unroll 1
        for (; vector < pause; vector += TEAM) {
            float x[VECTOR], y[VECTOR], t[VECTOR], far = 0.0f;
            piece.fetch(vector, x, y);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                t[i] = of.ratio(x[i], y[i]);
                far = larger_or_nan(far, fabs(t[i]));
            }
            const int64 first = static_cast<int64>(vector) * VECTOR;
            if constexpr (SUMS_P)
                add_row<EXACTLY, false>(few, of, x, top_p - first);
            if constexpr (SUMS_Q)
                add_row<EXACTLY, true>(few, of, y, top_q - first);
            if (!warp_any(!(far <= of.near))) {
                high = larger(high, far);
                float mean[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    mean[i] = add_near<EXACTLY>(few, of, x[i], y[i], t[i], also, i);
                also.end(vector);
                if constexpr (is_summed(SUM_V)) {
                    float close = fabs(t[0]);
#pragma unroll
                    for (int i = 1; i < VECTOR; ++i)
                        close = smaller(close, fabs(t[i]));
                    // The mean of p and q is sqrt(p q) cosh(T/2), which is near enough to 1 here.
                    if (close < UNSURE) {
#pragma unroll
                        for (int i = 0; i < VECTOR; ++i)
                            add_sign(few, mean[i], t[i]);
                    } else {
#pragma unroll
                        for (int i = 0; i < VECTOR; ++i)
                            few.add<SUM_V>(sign_of(mean[i], t[i]));
                    }
                }
                continue;
            }
            float tau[VECTOR], m[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                if constexpr (UNBOUNDED)
                    high = larger(high, fabs(t[i]));
                add_far<EXACTLY>(few, of, x[i], y[i], t[i], m[i], tau[i], also, i);
            }
            also.end(vector);
            if constexpr (has(JS)) {
                float k[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    k[i] = js_near(tau[i]);
                if (largest_of(tau) > 2.0f) {
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i)
                        k[i] = tau[i] > 2.0f ? js_far(tau[i]) : k[i];
                }
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    few.add<SUM_JS>(m[i], k[i]);
            }
        }
        constexpr float HALF = static_cast<float>(0.5 * LOG_OF_2);
        few.add<SUM_KL>(fma32(few.even, HALF, few.odd));
        few.add<SUM_REVERSE>(fma32(few.even, HALF, -few.odd));
#pragma unroll
        for (int i = 0; i < SUMS; ++i)
            sums[i] += double_of(few.sum[i]);
    }
    put_together(call, sums, double_of(high));
    return also.result();
}

// --- results ---------------------------------------------------------------------------------

// Put those of all parts of a row together.
DEVICE void put_parts_together(const Call& call, int64 row)
{
    const volatile double* states = call.states + row * call.parts * STATE + SECOND;
#pragma unroll 1
    for (int i = 0; i < NUMBERS; ++i) {
        double value = 0.0;
        for (int64 part = team_rank(); part < call.parts; part += TEAM) {
            const double other = states[part * STATE + i];
            value = i < SUMS ? value + other : larger(value, other);
        }
        value = i < SUMS ? team_add(value) : team_larger(value);
        if (team_rank() == 0)
            row_sums(call)[i] = value;
    }
    team_barrier();
}

enum Worth { GOOD, NOT_YET, UNDONE };

// What becomes of the sums of a row.
struct Results {
    const Call& call;
    const Constants& constants;
    const double* sums;
    int64 number;
    double a;
    bool exactly, writes;
    double delta, noise, scale;
    double least = INFINITY64;  // of all divergences
    bool again = false, is_even;

    DEVICE Results(const Call& call, int64 number, bool exactly, bool writes)
        : call(call), constants(row_constants(call)), sums(row_sums(call)), number(number),
          a(factor(call)), exactly(exactly), writes(writes)
    {
        // What the rounding of y - x, where it is about c, may make of a divergence: errors of
        // c 2**-24 in t, which average out over the symbols that carry the mass.
        const double c = fabs(constants.C) * LOG_OF_2;
        const double share = larger(constants.of_x.share, constants.of_y.share);
        noise = exactly ? 0.0 : c > 16.0 ? INFINITY64 : c * c * share / 100.0;
        // And how much larger 2**kx, 2**ky make all terms than they do in float32.
        const double rest_x = Split(constants.of_x.k).rest, rest_y = Split(constants.of_y.k).rest;
        scale = exactly ? 1.0 : exp2_called(0.5 * (rest_x + rest_y));
        is_even = exactly || fabs(rest_x - rest_y) < 1e-6;
        if (!is_even)
            noise = INFINITY64;
        delta = DIVERGES ? UNIT * of<SUM_D>() : 0.0;
    }

    template <int SUM>
    DEVICE double of() const
    {
        return sums[PLACE<SUM>] * scale;
    }

    // A divergence of which `second` delta**2 is to be taken away.
    DEVICE Worth divergence(double& value, double second)
    {
        if (SECOND_ORDER && !exactly) {
            if (!(second * DELTA * DELTA <= 2e-7 * value))
                return NOT_YET;
        } else {
            const double off = second * delta * delta;
            value -= off;
            if (!(fabs(off) <= SHARE * value))
                return NOT_YET;
        }
        least = smaller(least, value);
        return noise <= value ? GOOD : NOT_YET;
    }

    template <bool REVERSE>
    DEVICE Worth renyi(double& value, double sum, double beta)
    {
        const double off = 0.5 * beta * (beta + 1.0) * delta * delta;
        const double kl = REVERSE ? of<SUM_REVERSE>() : of<SUM_KL>();
        value = fma64(beta, kl, sum) * LOG_OF_2 - off;
        value = log1p_called(value) / beta;
        if (sums[SUMS] * larger(1.0, fabs(beta)) > LARGEST_RATIO)
            return UNDONE;
        if (!(fabs(off) <= SHARE * fabs(beta) * value) || !(noise <= value))
            return NOT_YET;
        least = smaller(least, value);
        return GOOD;
    }

    // S and U of a row, without its top; see single_pass.cu.
    DEVICE Worth rest(const Normalizer& of, double sum, double sum_log, double& S, double& U) const
    {
        const double k = exactly ? of.k : double_of(Split(of.k).whole);
        const double log_top = fma64(double_of(of.top.value), a, k), up = exp2_called(-log_top);
        S = sum * up;
        U = LOG_OF_2 * (log_top * sum - sum_log) * up;
        if (!is_even)
            return NOT_YET;
        return S >= UNDERFLOW && U < INFINITY64 ? GOOD : UNDONE;
    }

    DEVICE Worth statistics(const Rows& rows, const Normalizer& of, double S, double U, Worth worth,
                            double* results) const
    {
        const double top = double_of(of.top.value), inverse = rows.inverse_temperature;
        results[0] = worth == GOOD ? top * inverse : UNFINISHED;
        results[1] = S;
        results[2] = U;
        results[3] = static_cast<double>(of.top.index);
        const int64 token = call.tokens ? call.tokens[number] : -1;
        results[4] = NAN64;
        if (token >= 0 && token < call.width) {
            const char* row = row_address(rows, number);
            const int size = rows.dtype == FLOAT32 ? 4 : 2;
            results[4] = (entry64(row + token * size, rows.dtype) - top) * inverse;
        }
        return worth;
    }

    template <int I>
    DEVICE void finish(double* results, bool rows_differ)
    {
        constexpr Term term = TERM[I];
        double value = 0.0, S = 0.0, U = 0.0, five[5];
        Worth worth = GOOD;
        if constexpr (SUMS_P && (term == CROSS_ENTROPY || term == STATISTICS_P))
            worth = rest(constants.of_x, sums[PLACE<SUM_P>], sums[PLACE<SUM_P_LOG_P>], S, U);
        if constexpr (SUMS_Q && term == STATISTICS_Q)
            worth = rest(constants.of_y, sums[PLACE<SUM_Q>], sums[PLACE<SUM_Q_LOG_Q>], S, U);
        if constexpr (term == STATISTICS_P || term == ARGMAX_P)
            worth = statistics(call.p, constants.of_x, S, U, worth, five);
        if constexpr (term == STATISTICS_Q || term == ARGMAX_Q)
            worth = statistics(call.q, constants.of_y, S, U, worth, five);
        if constexpr (term == KL || term == CROSS_ENTROPY) {
            value = of<SUM_KL>() * LOG_OF_2;
            // What the entropy outweighs by far needs not be as accurate.
            const double entropy = term == KL ? 0.0 : log1p_called(S) + U / (1.0 + S);
            const double before = least;
            const Worth of_kl = divergence(value, 0.5);
            if (term == KL || of_kl == GOOD || !(fabs(value) <= 1e-7 * entropy))
                worth = worth == GOOD ? of_kl : worth;
            if (term != KL)
                least = before;
            value += entropy;
        }
        if constexpr (term == REVERSE_KL) {
            value = of<SUM_REVERSE>() * LOG_OF_2;
            worth = divergence(value, 0.5);
        }
        if constexpr (term == JEFFREYS) {
            value = of<SUM_JEFFREYS>() * (UNIT * LOG_OF_2);
            worth = divergence(value, 1.0);
        }
        if constexpr (term == JS) {
            value = of<SUM_JS>();
            worth = divergence(value, 0.125);
            value = smaller(value, LOG_OF_2);
        }
        if constexpr (term == HELLINGER2) {
            value = 0.5 * of<SUM_HELLINGER2>();
            worth = divergence(value, 0.125);
            value = smaller(value, 1.0);
        }
        if constexpr (term == TV) {
            // Of first order in delta, half of which is taken from one row and half given to the
            // other, but where that may change a sign.
            value = 0.5 * UNIT * of<SUM_H>() - 0.5 * delta * of<SUM_V>();
            const double wrong = 2.0 * fabs(delta) * of<SUM_NEAR>();
            const bool right = fabs(delta) <= DELTA && wrong <= larger(1e-6 * value, 1e-12);
            worth = right && noise <= value * value ? GOOD : NOT_YET;
            if (worth == GOOD)
                least = smaller(least, value);
            value = smaller(value, 1.0);
        }
        if constexpr (term == RENYI || term == REVERSE_RENYI)
            worth = renyi<term == REVERSE_RENYI>(value, of<SUM_RENYI + I>(), call.parameters[I]);
        constexpr bool INFINITE = term <= REVERSE_RENYI || term == JEFFREYS || term == CROSS_ENTROPY;
        if (INFINITE && !(sums[SUMS] <= FARTHEST))
            worth = UNDONE;
        again = again || worth == NOT_YET;
        if (writes) {
            if constexpr (COLUMNS<I> == 5) {
#pragma unroll
                for (int i = 0; i < 5; ++i)
                    results[i] = five[i];
            } else {
                const bool lost = value < UNDERFLOW && rows_differ;
                results[0] = worth == GOOD && !lost ? larger(value, 0.0) : UNFINISHED;
            }
        }
        if constexpr (I + 1 < COUNT)
            finish<I + 1>(results + COLUMNS<I>, rows_differ);
    }
};

struct Verdict {
    bool again;    // whether sums that are more exact would tell more
    double least;  // the smallest divergence
};
DEVICE Verdict& row_verdict(const Call& call)
{
    return *reinterpret_cast<Verdict*>(&row_constants(call) + 1);
}

// Of the row of this number, whose values go to `values` unless that is null.
OUTLINED Verdict finish(const Call& call, int64 number, bool exactly, double* values,
                        bool rows_differ)
{
    Results results(call, number, exactly, values != nullptr);
    results.finish<0>(values, rows_differ);
    return {results.again, results.least};
}

// The same value in the first column of every term.
template <int I>
DEVICE void fill(double* results, double value)
{
    results[0] = value;
    if constexpr (I + 1 < COUNT)
        fill<I + 1>(results + COLUMNS<I>, value);
}
