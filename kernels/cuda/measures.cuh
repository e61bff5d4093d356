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

// Add to the sums of a few entries those of Renyi divergences.
template <int I>
DEVICE void add_renyi(float (&few)[SUMS], float p, float q, float t, const float (&beta)[COUNT])
{
    if constexpr (is_summed(SUM_RENYI + I)) {
        constexpr bool REVERSE = TERM[I] == REVERSE_RENYI;
        float& sum = few[PLACE<SUM_RENYI + I>];
        const float exponent = smaller(REVERSE ? beta[I] * t : -beta[I] * t, FARTHEST);
        sum = fma32(REVERSE ? q : p, phi(exponent), sum);
    }
    if constexpr (I + 1 < COUNT)
        add_renyi<I + 1>(few, p, q, t, beta);
}

// Sum the terms of a row; or, for BALANCE, q - p alone. EXACTLY carries along what y - x rounds off
// and the constants leave; without it the one counts as noise, and of the others C's is in delta.
template <bool EXACTLY, bool BALANCE>
OUTLINED void sum_terms(const Call& call, Share share)
{
    // JS alone does without knowing delta, unless it is to be exact.
    constexpr bool MEASURES = BALANCE || (DIVERGES && (EXACTLY || !ONLY_JS));
    constexpr bool ONLY_H = !NEEDS_BOTH;
    const Piece piece(call, share);
    const float a = factor(call);
    const Constants& constants = row_constants(call);
    const Split kx(constants.of_x.k), ky(constants.of_y.k), c(constants.C);
    const int64 top_p = constants.of_x.top.index - share.first;
    const int64 top_q = constants.of_y.top.index - share.first;
    float beta[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        beta[i] = float_of(call.parameters[i]);
    double sums[SUMS] = {};
    float high = 0.0f;

    for (int vector = team_rank(); vector < piece.rows.vectors;) {
        float few[SUMS] = {};
#pragma unroll 1
        for (int n = 0; n < BLOCK && vector < piece.rows.vectors; ++n, vector += TEAM) {
            float x[VECTOR], y[VECTOR], tau[VECTOR], m[VECTOR];
            piece.fetch(vector, x, y);
            const int64 index = piece.rows.index(vector);
            const int hole_p = top_p - index >= 0 && top_p - index < VECTOR
                                   ? static_cast<int>(top_p - index)
                                   : -1;
            const int hole_q = top_q - index >= 0 && top_q - index < VECTOR
                                   ? static_cast<int>(top_q - index)
                                   : -1;
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                float u = fma32(x[i], a, kx.whole), v = fma32(y[i], a, ky.whole), t;
                if constexpr (EXACTLY) {
                    const Difference32 d(y[i], x[i]);
                    u += kx.rest;
                    v += ky.rest;
                    // What is lost is NaN where the difference is infinite.
                    t = fma32(d.value, a, c.whole) + fma32(larger(d.lost, -1e30f), a, c.rest);
                } else {
                    t = fma32(y[i] - x[i], a, c.whole);
                }
                // Entries that are -inf in both rows have m = 0 and any tau.
                tau[i] = smaller(fabs(t), FARTHEST);
                m[i] = exp2_approx(larger(u, v));
                if constexpr (UNBOUNDED)
                    high = larger(high, fabs(t));
                const Power power(-tau[i]);  // the smaller one over the larger one
                const float mh = m[i] * (ONLY_H ? one_minus_exp2(tau[i]) : -power.less_1);
                if constexpr (MEASURES)
                    few[PLACE<SUM_D>] += sign_of(mh, t);
                if constexpr (BALANCE)
                    continue;
                const bool q_is_larger = t > 0.0f;
                if constexpr (is_summed(SUM_KL)) {
                    const float term = q_is_larger ? power.psi : power.phi;
                    few[PLACE<SUM_KL>] = fma32(m[i], term, few[PLACE<SUM_KL>]);
                }
                if constexpr (is_summed(SUM_REVERSE)) {
                    const float term = q_is_larger ? power.phi : power.psi;
                    few[PLACE<SUM_REVERSE>] = fma32(m[i], term, few[PLACE<SUM_REVERSE>]);
                }
                if constexpr (is_summed(SUM_H))
                    few[PLACE<SUM_H>] += mh;
                if constexpr (is_summed(SUM_V)) {
                    if (tau[i] < static_cast<float>(2.0 * DELTA))
                        few[PLACE<SUM_NEAR>] += m[i];
                    else
                        few[PLACE<SUM_V>] += sign_of(m[i], t);
                }
                if constexpr (is_summed(SUM_JEFFREYS))
                    few[PLACE<SUM_JEFFREYS>] = fma32(mh, tau[i], few[PLACE<SUM_JEFFREYS>]);
                if constexpr (is_summed(SUM_HELLINGER2)) {
                    const float root = one_minus_exp2(0.5f * tau[i]);
                    few[PLACE<SUM_HELLINGER2>] =
                        fma32(m[i] * root, root, few[PLACE<SUM_HELLINGER2>]);
                }
                const float p = q_is_larger ? m[i] * power.whole : m[i];
                const float q = q_is_larger ? m[i] : m[i] * power.whole;
                if constexpr (SUMS_P) {
                    if (i != hole_p) {
                        few[PLACE<SUM_P>] += p;
                        few[PLACE<SUM_P_LOG_P>] =
                            fma32(p, larger(u, -200.0f), few[PLACE<SUM_P_LOG_P>]);
                    }
                }
                if constexpr (SUMS_Q) {
                    if (i != hole_q) {
                        few[PLACE<SUM_Q>] += q;
                        few[PLACE<SUM_Q_LOG_Q>] =
                            fma32(q, larger(v, -200.0f), few[PLACE<SUM_Q_LOG_Q>]);
                    }
                }
                if constexpr (has(RENYI) || has(REVERSE_RENYI))
                    add_renyi<0>(few, p, q, sign_of(tau[i], t), beta);
            }
            if constexpr (has(JS) && !BALANCE) {
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
                    few[PLACE<SUM_JS>] = fma32(m[i], k[i], few[PLACE<SUM_JS>]);
            }
        }
#pragma unroll
        for (int i = 0; i < SUMS; ++i)
            sums[i] += double_of(few[i]);
    }
    put_together(call, sums, double_of(high));
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
        scale = exactly ? 1.0 : exp2(0.5 * (rest_x + rest_y));
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
        if (ONLY_JS && !exactly) {
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
        value = log1p(value) / beta;
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
        const double log_top = fma64(double_of(of.top.value), a, k), up = exp2(-log_top);
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
            const double entropy = term == KL ? 0.0 : log1p(S) + U / (1.0 + S);
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
            value = 0.5 * UNIT * of<SUM_H>() - 0.25 * delta * (2.0 * of<SUM_V>() - delta);
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

OUTLINED Verdict finish(const Call& call, int64 number, bool exactly, bool writes, bool rows_differ)
{
    Results results(call, number, exactly, writes);
    results.finish<0>(call.values + number * call.columns, rows_differ);
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

