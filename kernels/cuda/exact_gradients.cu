// Gradients with respect to the logits, in float64, for any input whatever.
//
// With d = log(p/q), S = sum p**alpha q**(1-alpha), R = log(S)/(alpha-1) and the tilted distribution
// r = p**alpha q**(1-alpha)/S they are, up to factors that do not depend on the index,
//
//     KL             wrt q  q - p                    wrt p  p (d - W)
//     cross-entropy  wrt q  q - p                    wrt p  p (-log q - W)
//     Jeffreys       wrt q  q (-d - W) + (q - p)     wrt p  p (d - W) - (q - p)
//     JS             wrt q  q (log(q/m) - W)         wrt p  p (log(p/m) - W)
//     TV             wrt q  q (sign(-d)/2 - W)       wrt p  p (sign(d)/2 - W)
//     Renyi          wrt q  q - r                    wrt p  r - p
//
// where W is the mean of what it is subtracted from, so that the entries add up to 0, and
// r/p = exp((alpha-1) (d - R)), r/q = exp(alpha d - (alpha-1) R). Renyi of order infinity has
// r = 1 where d is largest.
//
// parameters[0] is the order or the weight of P, [1] and [2] are the factors of both sides, to which
// [3] adds that many of S; [5] and [6] the entries of their rows, of which those beyond the width
// are 0, and [15] is the column of the marks. phase 0: all rows; phase 1: those that are marked as
// unfinished. A row that is not read, or has a factor of 0, has gradient 0; one that is no
// distribution NaN. Where a value is infinite and has no derivative the gradient is 0; that of Renyi
// is its limit, in which r is nothing where both have support. The gradient may be written over the
// logits that it belongs to: a thread reads and writes the same entries throughout.

#if defined(OPERATION_kl)
constexpr bool CROSS = false, TV = false, JS = false, BOTH_WAYS = false, RENYI = false;
#elif defined(OPERATION_cross_entropy)
constexpr bool CROSS = true, TV = false, JS = false, BOTH_WAYS = false, RENYI = false;
#elif defined(OPERATION_tv)
constexpr bool CROSS = false, TV = true, JS = false, BOTH_WAYS = false, RENYI = false;
#elif defined(OPERATION_js)
constexpr bool CROSS = false, TV = false, JS = true, BOTH_WAYS = false, RENYI = false;
#elif defined(OPERATION_jeffreys)
constexpr bool CROSS = false, TV = false, JS = false, BOTH_WAYS = true, RENYI = false;
#elif defined(OPERATION_renyi) || defined(OPERATION_renyi_0) || defined(OPERATION_renyi_inf)
constexpr bool CROSS = false, TV = false, JS = false, BOTH_WAYS = false, RENYI = true;
#endif
#ifdef OPERATION_renyi_0
using OfRenyi = RenyiOfOrder0;
#else
using OfRenyi = Renyi;
#endif
#ifdef OPERATION_renyi_inf
constexpr bool PEAK = true;
#else
constexpr bool PEAK = false;
#endif

// What a mean is subtracted from.
template <bool OF_P>
DEVICE double bracket(const Index& at, double weight)
{
    const double d = OF_P ? -at.t : at.t;  // of the row itself over the other
    if constexpr (CROSS)
        return -larger(at.log_q, -LARGEST);
    if constexpr (TV)
        return d > 0.0 ? 0.5 : d < 0.0 ? -0.5 : 0.0;
    if constexpr (JS) {
        const double own = OF_P ? weight : 1.0 - weight, other = OF_P ? 1.0 - weight : weight;
        const double log = log1p((d > 0.0 ? other : own) * expm1(-fabs(d)));
        return d > 0.0 ? -log : d - log;
    }
    return d;
}

// A number of a row that is the same at all indices: R, or a mean and the place of the largest d.
struct Known {
    double divergence, mean_p, mean_q, place;
};

template <bool OF_P>
DEVICE double entry(const Index& at, int64 j, const Known& known, double alpha)
{
    const double own = OF_P ? at.p : at.q;
    const double change = at.t > 0.0 ? at.distance() : -at.distance();  // q - p
    if constexpr (RENYI) {
        double difference;  // r less the distribution of the row
        const double beta = alpha - 1.0, d = -at.t;
        const double tilt = OF_P ? beta * (d - known.divergence)
                                 : fma64(alpha, d, -beta * known.divergence);
        if (PEAK)
            difference = (static_cast<double>(j) == known.place ? 1.0 : 0.0) - own;
        else if (!at.in_p())
            difference = -own;
        else if (!at.in_q() && alpha > 1.0)
            difference = 0.0;
        else if (fabs(tilt) < 1.0)
            difference = own * expm1(tilt);
        else
            difference = exp((OF_P ? at.log_p : at.log_q) + tilt) - own;
        return OF_P ? difference : -difference;
    }
    if constexpr (!OF_P && !TV && !JS && !BOTH_WAYS)
        return change;
    double value = own * (bracket<OF_P>(at, alpha) - (OF_P ? known.mean_p : known.mean_q));
    if constexpr (BOTH_WAYS)
        value += OF_P ? -change : change;
    return value;
}

DEVICE Known known_of(const Call& call, const Prepared& rows, double alpha)
{
    Known known = {0.0, 0.0, 0.0, -1.0};
    if constexpr (PEAK) {
        Peak peak;
        for (int64 j = team_rank(); j < call.width; j += TEAM) {
            const Index at = rows.index(j);
            peak.see(at.in_p() ? -at.t : -INFINITY64, j);
        }
        peak.join();
        known.place = peak.index;
    } else if constexpr (RENYI) {
        if (alpha > 1.0 && rows.only_p)
            known.divergence = INFINITY64;
        else if (alpha > 0.0 || rows.only_q)
            known.divergence = value_of<OfRenyi>(call, rows, alpha - 1.0);
    } else {
        double sums[4] = {0.0, 0.0, 0.0, 0.0};
        for (int64 j = team_rank(); j < call.width; j += TEAM) {
            const Index at = rows.index(j);
            if (at.p > 0.0)
                sums[0] = fma64(at.p, bracket<true>(at, alpha), sums[0]);
            if (at.q > 0.0)
                sums[1] = fma64(at.q, bracket<false>(at, alpha), sums[1]);
            sums[2] += at.p;
            sums[3] += at.q;
        }
        team_add(sums);
        known.mean_p = sums[0] / sums[2];
        known.mean_q = sums[1] / sums[3];
    }
    return known;
}

OUTLINED void fill(const Rows& into, int64 row, int64 first, int64 width, double value)
{
    if (!into.data)
        return;
    char* out = const_cast<char*>(row_address(into, row));
    for (int64 j = first + team_rank(); j < width; j += TEAM)
        store_as(out + j * into.stride, into.dtype, value);
}

template <bool OF_P>
DEVICE void store(const Rows& into, int64 row, const Index& at, int64 j, const Known& known,
                  double alpha, double factor)
{
    if (!into.data)
        return;
    const double value = factor * entry<OF_P>(at, j, known, alpha);
    char* out = const_cast<char*>(row_address(into, row)) + j * into.stride;
    const bool inside = OF_P ? at.in_p() : at.in_q();
    store_as(out, into.dtype, inside && fabs(value) < INFINITY64 ? value : 0.0);
}

DEVICE void write_gradients(const Call& call, int64 row)
{
    const double alpha = call.parameters[0];
    const int64 width_p = static_cast<int64>(call.parameters[5]);
    const int64 width_q = static_cast<int64>(call.parameters[6]);
    fill(call.into_p, row, call.width, width_p, 0.0);
    fill(call.into_q, row, call.width, width_q, 0.0);
    const double scale = call.scales ? call.scales[row] : 1.0;
    if (!is_read(call, row) || scale == 0.0) {
        fill(call.into_p, row, 0, call.width, 0.0);
        fill(call.into_q, row, 0, call.width, 0.0);
        return;
    }
    Prepared rows(call, row);
    if (!rows.valid) {
        fill(call.into_p, row, 0, call.width, NAN64);
        fill(call.into_q, row, 0, call.width, NAN64);
        return;
    }
    rows.normalize(call);
    const Known known = known_of(call, rows, alpha);
    double factor_p = scale * call.parameters[1] * call.p.inverse_temperature;
    double factor_q = scale * call.parameters[2] * call.q.inverse_temperature;
    if (call.parameters[3] != 0.0) {
        const double power_sum = exp_called((alpha - 1.0) * known.divergence);
        factor_p *= power_sum;
        factor_q *= power_sum;
    }
    if (!TV && !JS && !RENYI && rows.only_p)
        factor_p = 0.0;
    if (BOTH_WAYS && rows.only_q)
        factor_q = 0.0;
    for (int64 j = team_rank(); j < call.width; j += TEAM) {
        const Index at = rows.index(j);
        store<true>(call.into_p, row, at, j, known, alpha, factor_p);
        store<false>(call.into_q, row, at, j, known, alpha, factor_q);
    }
}

KERNEL(THREADS, BLOCKS) exact_gradients(ARGUMENT Call call)
{
    each_row(call, static_cast<int64>(call.parameters[15]),
             [&](int64 row) { write_gradients(call, row); });
}
