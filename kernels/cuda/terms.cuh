// What is asked for of a pair of rows: any number of TERMS, and which sums they take.
//
// TERMS is a list of the names below, each of which has a column of results, or five (those of
// `statistics` and of `top`, see single_pass.cu).

#pragma once

enum Term {
    KL,
    REVERSE_KL,
    RENYI,
    REVERSE_RENYI,
    JS,
    TV,
    HELLINGER2,
    JEFFREYS,
    CROSS_ENTROPY,
    STATISTICS_P,
    STATISTICS_Q,
    ARGMAX_P,
    ARGMAX_Q,
};
constexpr Term TERM[] = {TERMS};
constexpr int COUNT = sizeof(TERM) / sizeof(Term);

DEVICE constexpr bool has(Term term)
{
    for (int i = 0; i < COUNT; ++i) {
        if (TERM[i] == term)
            return true;
    }
    return false;
}

template <int I>
constexpr int COLUMNS = TERM[I] >= STATISTICS_P ? 5 : 1;

// What is summed over a row. Those of Renyi divergences come last, by the number of their terms.
enum Sum {
    SUM_D,        // q - p
    SUM_KL,       // terms of KL
    SUM_REVERSE,  // terms of reverse KL
    SUM_JS,
    SUM_H,        // abs(q - p)
    SUM_NEAR,     // (p + q)/2, where delta may change the sign of q - p
    SUM_V,        // and with that sign where it may not
    SUM_HELLINGER2,
    SUM_JEFFREYS,
    SUM_P,        // p, and p log2 p, but for the vector where the largest entry is
    SUM_P_LOG_P,
    SUM_Q,
    SUM_Q_LOG_Q,
    SUM_RENYI,
};

constexpr bool SUMS_P = has(STATISTICS_P) || has(CROSS_ENTROPY), SUMS_Q = has(STATISTICS_Q);
constexpr bool TOP_P = SUMS_P || has(ARGMAX_P), TOP_Q = SUMS_Q || has(ARGMAX_Q);
// Terms that are infinite where the supports differ; they do not know how far |t| may go.
constexpr bool UNBOUNDED = has(KL) || has(REVERSE_KL) || has(RENYI) || has(REVERSE_RENYI) ||
                           has(JEFFREYS) || has(CROSS_ENTROPY);
// Terms that need more of p/q than how far it is from 1: they have q - p over log 2.
constexpr bool NEEDS_BOTH = has(KL) || has(REVERSE_KL) || has(RENYI) || has(REVERSE_RENYI) ||
                            has(CROSS_ENTROPY) || SUMS_P || SUMS_Q;
constexpr double UNIT = NEEDS_BOTH ? LOG_OF_2 : 1.0;
// What depends on delta in second order alone, and may do without knowing it.
constexpr bool SECOND_ORDER = COUNT == 1 && (has(JS) || has(HELLINGER2));
constexpr bool DIVERGES = UNBOUNDED || has(JS) || has(TV) || has(HELLINGER2);

DEVICE constexpr bool is_summed(int sum)
{
    switch (sum) {
    case SUM_D: return DIVERGES;
    case SUM_KL: return has(KL) || has(CROSS_ENTROPY) || has(RENYI);
    case SUM_REVERSE: return has(REVERSE_KL) || has(REVERSE_RENYI);
    case SUM_JS: return has(JS);
    case SUM_H: return has(TV);
    case SUM_NEAR: return has(TV);
    case SUM_V: return has(TV);
    case SUM_HELLINGER2: return has(HELLINGER2);
    case SUM_JEFFREYS: return has(JEFFREYS);
    case SUM_P: return SUMS_P;
    case SUM_P_LOG_P: return SUMS_P;
    case SUM_Q: return SUMS_Q;
    case SUM_Q_LOG_Q: return SUMS_Q;
    default: return TERM[sum - SUM_RENYI] == RENYI || TERM[sum - SUM_RENYI] == REVERSE_RENYI;
    }
}
// Where a sum is among those that there are.
DEVICE constexpr int place(int sum)
{
    int before = 0;
    for (int i = 0; i < sum; ++i)
        before += is_summed(i) ? 1 : 0;
    return before;
}
template <int SUM>
constexpr int PLACE = place(SUM);
constexpr int SUMS = PLACE<SUM_RENYI + COUNT> > 0 ? PLACE<SUM_RENYI + COUNT> : 1;
