// Every operation in float64, for any input whatever: the path without preconditions.
//
// It serves float64 logits, probabilities, unequal temperatures, strided rows, and the rows that
// the float32 kernels hand over. One OPERATION_* says what it computes, parameters[0] is its order,
// its weight or which divergence it is, parameters[15] the first column that it writes. phase 0: all rows; phase 1: those
// whose first column is marked as unfinished. To a pair of rows, when it has been prepared, a block
// adds up the sum of non-negative terms (an *integrand*: of p, q, t = log(q/p) and logarithms).

struct OfRow {
    static constexpr bool ONE_ROW = true;
    static constexpr bool STATISTICS = false, WRITES = false;
};
struct Statistics : OfRow {
    static constexpr bool STATISTICS = true;
};
struct LogSoftmax : OfRow {
    static constexpr bool WRITES = true;
};
struct RenyiEntropy : OfRow {};

#if defined(OPERATION_divergence)
using Operation = Divergence;
#elif defined(OPERATION_js)
using Operation = JensenShannon;
#elif defined(OPERATION_renyi)
using Operation = Renyi;
#elif defined(OPERATION_renyi_0)
using Operation = RenyiOfOrder0;
#elif defined(OPERATION_renyi_inf)
using Operation = RenyiOfOrderInfinity;
#elif defined(OPERATION_statistics)
using Operation = Statistics;
#elif defined(OPERATION_log_softmax)
using Operation = LogSoftmax;
#elif defined(OPERATION_renyi_entropy)
using Operation = RenyiEntropy;
#endif

// --- rows -----------------------------------------------------------------------------------

template <class OPERATION>
DEVICE void compute_row(const Call& call, int64 row, double* values)
{
    const char* x = row_address(call.p, row);
    const int64 width = is_read(call, row) ? call.width : 0;
    const double inverse = call.p.inverse_temperature;
    const double alpha = call.parameters[0];

    Peak top;
    bool bad = false;
    for (int64 j = team_rank(); j < width; j += TEAM) {
        const double entry = logit(call.p, x, j);
        top.see(entry, j);
        bad = bad || !(entry < INFINITY64);
    }
    top.join();
    const bool finite = !team_any(bad) && top.value > -INFINITY64;

    // S = sum exp(w), U = sum -w exp(w) or R = sum exp(alpha w), w = (x - top)/T, without the top.
    double sums[2] = {0.0, 0.0};
    for (int64 j = team_rank(); finite && j < width; j += TEAM) {
        const double entry = logit(call.p, x, j);
        if (entry == -INFINITY64 || static_cast<double>(j) == top.index)
            continue;
        const double w = larger((entry - top.value) * inverse, -LARGEST);
        const double e = exp(w);
        sums[0] += e;
        if constexpr (OPERATION::STATISTICS)
            sums[1] = fma64(e, -w, sums[1]);
        else if constexpr (!OPERATION::WRITES)
            sums[1] += exp(alpha * w);
    }
    team_add(sums);
    const double log_s = log1p(sums[0]);

    if constexpr (OPERATION::WRITES) {
        char* out = call.out + (call.out_offsets ? call.out_offsets[row] : row * call.out_stride);
        const int64 stride = static_cast<int64>(call.parameters[12]);
        for (int64 j = team_rank(); j < call.width; j += TEAM) {
            double log_p = NAN64;
            if (finite) {
                const double entry = logit(call.p, x, j);
                log_p = within_range(entry, (entry - top.value) * inverse) - log_s;
            }
            store_as(out + j * stride, call.out_dtype, log_p);
        }
    } else if constexpr (OPERATION::STATISTICS) {
        if (team_rank() != 0)
            return;
        double token = NAN64;
        const int64 index = finite && call.tokens ? call.tokens[row] : -1;
        if (index >= 0 && index < width) {
            const double entry = logit(call.p, x, index);
            token = within_range(entry, (entry - top.value) * inverse);
        }
        values[0] = finite ? top.value * inverse : NAN64;
        values[1] = sums[0];
        values[2] = sums[1];
        values[3] = finite ? top.index : NAN64;
        values[4] = token;
    } else {
        // log sum p**alpha = log(1 + R) - alpha log(1 + S), over 1 - alpha; near alpha = 1 from
        // sum p expm1((alpha - 1) log p), whose terms have one sign.
        const double beta = alpha - 1.0;
        double value = log_s;
        if (fabs(beta) <= 0.5) {
            double total = 0.0;
            for (int64 j = team_rank(); finite && j < width; j += TEAM) {
                const double log_p = (logit(call.p, x, j) - top.value) * inverse - log_s;
                const double w = larger(log_p, -1e9);
                total += exp(log_p) * (beta == 0.0 ? -w : expm1(smaller(beta * w, 700.0)));
            }
            total = team_add(total);
            value = beta == 0.0 ? total : -log1p(total) / beta;
        } else if (alpha < INFINITY64) {
            value = (multiply_exact(alpha, log_s) - log1p(sums[1])) / beta;
        }
        if (team_rank() == 0)
            values[0] = finite ? value + 0.0 : NAN64;  // + 0.0 turns -0.0 into 0.0
    }
}

template <class OPERATION>
DEVICE double compute_pair(const Call& call, int64 row)
{
    const double parameter = call.parameters[0];
    Prepared rows(call, row);
    if (!rows.valid)
        return NAN64;
    if ((rows.only_p && OPERATION::infinite_without_q(parameter)) ||
        (rows.only_q && OPERATION::infinite_without_p(parameter)))
        return INFINITY64;
    if (OPERATION::MASS && !rows.only_q)
        return 0.0;
    rows.normalize(call);
    return value_of<OPERATION>(call, rows, parameter);
}

// The values of one row, NaN where it must not be read.
template <class OPERATION>
DEVICE void compute(const Call& call, int64 row, double* values)
{
    if constexpr (OPERATION::ONE_ROW) {
        compute_row<OPERATION>(call, row, values);
    } else {
        const double value = is_read(call, row) ? compute_pair<OPERATION>(call, row) : NAN64;
        if (team_rank() == 0)
            values[0] = value;
    }
}

KERNEL(THREADS, BLOCKS) exact(const Call call)
{
    const int64 column = static_cast<int64>(call.parameters[15]);
    each_row(call, column, [&](int64 row) {
        compute<Operation>(call, row, call.values + row * call.columns + column);
    });
}
