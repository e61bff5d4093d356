// Two rows in float64, for any input whatever: logits of every type and layout, probabilities,
// unequal temperatures.
//
// A team reads a row pair twice or more before it knows p, q and log(q/p) of every index:
//
// 1. the maxima, and which supports differ;
// 2. the normalizers, and the difference of their logarithms from terms that vanish where the rows
//    agree, with the constant moved once or twice until it fits.
//
// All steps are symmetric in the two rows or change sign only, so that symmetric divergences give
// the same bits when the arguments are swapped. To keep that, products that are added to their
// mirror images must not be contracted.

#pragma once

constexpr double LARGEST = 1.7976931348623157e308;

// (atanh(s) - s)/s for abs(s) <= 0.172.
DEVICE double atanh_tail(double s)
{
    const double z = s * s;
    double tail = fma64(z, 1.0 / 23.0, 1.0 / 21.0);
    tail = fma64(tail, z, 1.0 / 19.0);
    tail = fma64(tail, z, 1.0 / 17.0);
    tail = fma64(tail, z, 1.0 / 15.0);
    tail = fma64(tail, z, 1.0 / 13.0);
    tail = fma64(tail, z, 1.0 / 11.0);
    tail = fma64(tail, z, 1.0 / 9.0);
    tail = fma64(tail, z, 1.0 / 7.0);
    tail = fma64(tail, z, 1.0 / 5.0);
    tail = fma64(tail, z, 1.0 / 3.0);
    return tail * z;
}

// (1 + t) log1p(t) - t >= 0 without cancellation, for finite t >= -1. With s = t/(2 + t) it is
// 2/(1 - s) [s**2 + (1 + s)(atanh(s) - s)].
DEVICE double jensen(double t)
{
    const double s = t / (2.0 + t);
    if (fabs(s) < 0.17)
        return 2.0 / (1.0 - s) * s * fma64(1.0 + s, atanh_tail(s), s);
    return t == -1.0 ? 1.0 : fma64(1.0 + t, log1p(t), -t);
}

// --- operations -----------------------------------------------------------------------------

// One index: p, q, t = log(q/p), log p, log q. All are 0 or finite outside the supports but the
// logarithms, which are -inf there.
struct Index {
    double p, q, t, log_p, log_q;

    DEVICE bool in_p() const { return log_p > -INFINITY64; }
    DEVICE bool in_q() const { return log_q > -INFINITY64; }
    // abs(p - q).
    DEVICE double distance() const { return larger(p, q) * -expm1(-fabs(t)); }
};

struct OfPair {
    static constexpr bool ONE_ROW = false;
    // Whether the result is +inf where P has support that Q has not, or Q that P has not.
    static DEVICE bool infinite_without_q(double) { return false; }
    static DEVICE bool infinite_without_p(double) { return false; }
    // Rounding must not carry a result beyond what it can be.
    static DEVICE double ceiling(double) { return INFINITY64; }
    // Whether the result is the largest term, or comes from a sum of exponentials as well.
    static constexpr bool MAXIMUM = false, EXPONENTIAL = false, MASS = false;
    static DEVICE double exponent(const Index&, double) { return 0.0; }
};

// One of those that need no parameter, which is its number: known to launches.py. They differ in a
// few instructions, and nearly every call may fall back on one of them: they are compiled together.
struct Divergence : OfPair {
    enum Which { KULLBACK_LEIBLER, CROSS_ENTROPY, VARIATION, HELLINGER, JEFFREYS };

    static DEVICE bool infinite_without_q(double number)
    {
        return number == KULLBACK_LEIBLER || number == CROSS_ENTROPY || number == JEFFREYS;
    }
    static DEVICE bool infinite_without_p(double number) { return number == JEFFREYS; }
    static DEVICE double ceiling(double number)
    {
        return number == VARIATION || number == HELLINGER ? 1.0 : INFINITY64;
    }
    static DEVICE double term(const Index& at, double number)
    {
        switch (static_cast<int>(number)) {
        case KULLBACK_LEIBLER:
            // p (exp(t) - 1 - t); where q is much larger than p, as q - p - p t.
            return at.t > 1.0 ? fma64(at.p, -at.t, at.q - at.p) : at.p * exponential_tail(at.t);
        case CROSS_ENTROPY: return at.p * -larger(at.log_q, -LARGEST);
        case VARIATION: return at.distance() * 0.5;
        case HELLINGER: {
            const double r = expm1(fabs(at.t) * -0.5);
            return larger(at.p, at.q) * r * r * 0.5;
        }
        default: return at.distance() * fabs(at.t);
        }
    }
};

struct JensenShannon : OfPair {
    static DEVICE double ceiling(double weight)
    {
        return -(multiply_exact(weight, log_called(weight)) +
                 multiply_exact(1.0 - weight, log1p_called(-weight)));
    }
    // m [w f(u) + (1-w) f(v)] with f = jensen, u = (p-m)/m, v = (q-m)/m.
    static DEVICE double term(const Index& at, double weight)
    {
        const double other = 1.0 - weight;
        const double difference = at.t > 0.0 ? -at.distance() : at.distance();  // p - q
        const double m = multiply_exact(weight, at.p) + multiply_exact(other, at.q);
        const double ratio = m > 0.0 ? difference / m : 0.0;
        const double u = larger(-1.0, other * ratio);
        const double v = larger(-1.0, -weight * ratio);
        return m * (multiply_exact(weight, jensen(u)) + multiply_exact(other, jensen(v)));
    }
};

// parameter: beta, the order less 1.
struct Renyi : OfPair {
    static constexpr bool EXPONENTIAL = true;
    static DEVICE bool infinite_without_q(double beta) { return beta >= 0.0; }
    // p [phi(beta d) + beta phi(-d)] with d = -t and phi(t) = exp(t) - 1 - t; far apart,
    // p expm1(beta d) + beta (q - p).
    static DEVICE double term(const Index& at, double beta)
    {
        const double v = -beta * at.t;
        if (fabs(at.t) < 1.0 && fabs(v) < 1.0)
            return at.p * (exponential_tail(v) + beta * exponential_tail(at.t));
        return at.p * expm1(smaller(v, 700.0)) + beta * (at.q - at.p);
    }
    // alpha log p + (1 - alpha) log q = log p + beta log(p/q).
    static DEVICE double exponent(const Index& at, double beta)
    {
        return at.in_p() && at.in_q() ? fma64(at.t, -beta, at.log_p) : -INFINITY64;
    }
};

// The logarithm of Q's mass on the support of P, or near 0 from the mass outside.
struct RenyiOfOrder0 : OfPair {
    static constexpr bool EXPONENTIAL = true, MASS = true;
    static DEVICE double term(const Index& at, double) { return at.in_p() ? 0.0 : at.q; }
    static DEVICE double exponent(const Index& at, double)
    {
        return at.in_p() ? at.log_q : -INFINITY64;
    }
};

// log(p/q) on the support of P.
struct RenyiOfOrderInfinity : OfPair {
    static constexpr bool MAXIMUM = true;
    static DEVICE bool infinite_without_q(double) { return true; }
    static DEVICE double term(const Index& at, double) { return at.in_p() ? -at.t : -INFINITY64; }
};

// --- rows -----------------------------------------------------------------------------------

// An entry as a logit; probabilities become their logarithms, and those below 0 NaN.
DEVICE double logit(const Rows& rows, const char* row, int64 index)
{
    const double entry = entry64(row + index * rows.stride, rows.dtype);
    return rows.probabilities ? log_called(entry) : entry;
}

// The largest entry of a row and its first index, of which each thread has seen some.
struct Peak {
    double value = -INFINITY64;
    double index = INFINITY64;

    DEVICE void see(double entry, int64 at)
    {
        if (entry > value) {
            value = entry;
            index = static_cast<double>(at);
        }
    }
    DEVICE void join()
    {
        const double largest = team_larger(value);
        index = -team_larger(value == largest ? -index : -INFINITY64);
        value = largest;
    }
};

// A finite logit far below the range is still in the support.
DEVICE double within_range(double logit, double exponent)
{
    return logit == -INFINITY64 ? logit : larger(exponent, -LARGEST);
}

// a - b, and what its rounding lost (NaN at infinity).
struct Difference {
    double value, lost;

    DEVICE Difference(double a, double b)
    {
        value = a - b;
        const double back = value - a;
        lost = (a - (value - back)) - (b + back);
    }
};

// Two rows relative to their maxima.
struct Pair {
    const Rows &p, &q;
    const char *x, *y;
    Peak top_x, top_y;
    double largest_p, largest_q;  // the largest probabilities, where entries are such

    struct Exponents {
        double u, v, t;  // u = (x - max)/T, v = (y - max)/T, t = v - u
    };

    // t is rounded once: what the subtractions round off is carried along.
    DEVICE Exponents at(int64 index) const
    {
        const double inverse_p = p.inverse_temperature, inverse_q = q.inverse_temperature;
        const bool same = inverse_p == inverse_q;
        const double entry_x = logit(p, x, index), entry_y = logit(q, y, index);
        const Difference dx(entry_x, top_x.value), dy(entry_y, top_y.value);
        const double u = multiply_exact(dx.value, inverse_p);
        const double v = multiply_exact(dy.value, inverse_q);
        double t, lost;
        if (same) {
            t = multiply_exact(dy.value - dx.value, inverse_p);
            lost = multiply_exact(dy.lost - dx.lost, inverse_p);
        } else {
            t = fma64(dy.value, inverse_q, -u);
            lost = fma64(dy.lost, inverse_q, -multiply_exact(dx.lost, inverse_p)) -
                   fma64(dx.value, inverse_p, -u);
        }
        if (lost == lost)
            t += lost;
        if (same && p.probabilities && q.probabilities) {
            // The logarithm of (q/q_max)/(p/p_max) near 1 comes from exact products, not from
            // logarithms: 2 atanh(s) with s = (q p_max - p q_max)/(q p_max + p q_max).
            const double a = entry64(x + index * p.stride, p.dtype);
            const double b = entry64(y + index * q.stride, q.dtype);
            const double left = multiply_exact(b, largest_p);
            const double right = multiply_exact(a, largest_q);
            const double rest = fma64(b, largest_p, -left) - fma64(a, largest_q, -right);
            const double s = ((left - right) + rest) / (left + right);
            if (fabs(s) < 0.17 && smaller(left, right) > 1e-280)
                t = 2.0 * inverse_p * fma64(s, atanh_tail(s), s);
        }
        return {within_range(entry_x, u), within_range(entry_y, v), t};
    }
};

// Normalizers relative to the maxima. The last correction to log(q/p) is kept apart, because it
// goes to a sum that cancels.
struct Normalizers {
    double log_x, log_y, offset, fine;

    DEVICE Index index(const Pair& pair, int64 j) const
    {
        const Pair::Exponents at = pair.at(j);
        const double log_p = at.u - log_x, log_q = at.v - log_y;
        const double t = (at.t + offset) + fine;
        return {exp(log_p), exp(log_q), t == t ? larger(smaller(t, LARGEST), -LARGEST) : 0.0,
                log_p, log_q};
    }
};

// ``offset`` tends to log(Sx/Sy), with the tops in.
DEVICE Normalizers normalizers(const Pair& pair, int64 width)
{
    Normalizers found = {0.0, 0.0, 0.0, 0.0};
    for (int attempt = 0; attempt < 4; ++attempt) {
        const double shift = found.offset + found.fine;
        const double fx = exp_called(-0.5 * shift), fy = exp_called(0.5 * shift);
        double sums[4] = {0.0, 0.0, 0.0, 0.0};  // Sx, Sy; of fy ey - fx ex, and of its absolutes
        for (int64 j = team_rank(); j < width; j += TEAM) {
            const Pair::Exponents at = pair.at(j);
            const double ex = exp(at.u), ey = exp(at.v);
            const double d = (at.t + found.offset) + found.fine;
            const double tau = smaller(fabs(d), 700.0);  // NaN from -inf - -inf: ex = ey = 0
            const double change = larger(ex * fx, ey * fy) * -expm1(-tau);
            sums[0] += static_cast<double>(j) == pair.top_x.index ? 0.0 : ex;
            sums[1] += static_cast<double>(j) == pair.top_y.index ? 0.0 : ey;
            sums[2] += d > 0.0 ? change : -change;
            sums[3] += change;
        }
        team_add(sums);
        found.log_x = log1p_called(sums[0]);
        found.log_y = log1p_called(sums[1]);
        const double total =
            multiply_exact(fx, 1.0 + sums[0]) + multiply_exact(fy, 1.0 + sums[1]);
        const double correction = -2.0 * atanh(sums[2] / total);
        if (!(fabs(sums[2]) < 0.5 * total)) {
            found.offset = found.log_x - found.log_y;
            found.fine = 0.0;
        } else if (fabs(sums[2]) > 0.25 * sums[3]) {
            found.offset += found.fine + correction;
            found.fine = 0.0;
        } else {
            found.fine += correction;
            break;
        }
        if (!(fabs(found.offset) < 600.0))
            break;
    }
    return found;
}

// Two rows, ready to be looked at index by index.
struct Prepared {
    Pair pair;
    Normalizers normalized;
    bool valid;           // no NaN or +inf, and support in both
    bool only_p, only_q;  // whether there is support of only one

    DEVICE Prepared(const Call& call, int64 row)
        : pair{call.p, call.q, row_address(call.p, row), row_address(call.q, row)}
    {
        float found[3] = {0.0f, 0.0f, 0.0f};  // NaN or +inf; support of P only; support of Q only
        for (int64 j = team_rank(); j < call.width; j += TEAM) {
            const double entry_x = logit(call.p, pair.x, j), entry_y = logit(call.q, pair.y, j);
            pair.top_x.see(entry_x, j);
            pair.top_y.see(entry_y, j);
            if (!(entry_x < INFINITY64) || !(entry_y < INFINITY64))
                found[0] = 1.0f;
            if (entry_x > -INFINITY64 && entry_y == -INFINITY64)
                found[1] = 1.0f;
            if (entry_y > -INFINITY64 && entry_x == -INFINITY64)
                found[2] = 1.0f;
        }
        team_join<Larger>(found);
        pair.top_x.join();
        pair.top_y.join();
        valid = found[0] == 0.0f && pair.top_x.value > -INFINITY64 &&
                pair.top_y.value > -INFINITY64;
        only_p = found[1] > 0.0f;
        only_q = found[2] > 0.0f;
    }

    // The rest, for rows that are valid.
    DEVICE void normalize(const Call& call)
    {
        pair.largest_p = entry64(pair.x + static_cast<int64>(pair.top_x.index) * call.p.stride,
                                 call.p.dtype);
        pair.largest_q = entry64(pair.y + static_cast<int64>(pair.top_y.index) * call.q.stride,
                                 call.q.dtype);
        normalized = normalizers(pair, call.width);
    }

    DEVICE Index index(int64 j) const { return normalized.index(pair, j); }
};

// The sum of an operation over a pair that is prepared and normalized, or what follows from it.
template <class OPERATION>
DEVICE double value_of(const Call& call, const Prepared& rows, double parameter)
{
    double value = 0.0;
    double peak = -INFINITY64;
    for (int64 j = team_rank(); j < call.width; j += TEAM) {
        const Index at = rows.index(j);
        const double term = OPERATION::term(at, parameter);
        if constexpr (OPERATION::MAXIMUM)
            peak = larger(peak, term);
        else
            value += term;
        if constexpr (OPERATION::EXPONENTIAL)
            peak = larger(peak, OPERATION::exponent(at, parameter));
    }
    value = team_add(value);
    peak = team_larger(peak);

    if constexpr (OPERATION::MAXIMUM)
        value = peak;
    if constexpr (OPERATION::EXPONENTIAL) {
        // The logarithm of the sum whose terms' logarithms are the exponents: of
        // S = sum p**alpha q**(1 - alpha), or of Q's mass on the support of P.
        double log_s = peak;
        if (fabs(peak) < INFINITY64) {
            double total = 0.0;
            for (int64 j = team_rank(); j < call.width; j += TEAM)
                total += exp(OPERATION::exponent(rows.index(j), parameter) - peak);
            log_s += log_called(team_add(total));
        }
        // Close to 0 it comes from the sum that does not cancel, which on the other hand has lost
        // terms where p underflows.
        const double close = log1p_called(larger(OPERATION::MASS ? -value : value, -1.0));
        if (fabs(log_s) < 1.0 && fabs(close - log_s) < 1e-9)
            log_s = close;
        value = OPERATION::MASS ? -log_s : log_s / parameter;
    }
    const double ceiling = OPERATION::ceiling(parameter);
    return value > ceiling ? ceiling : value <= 0.0 ? 0.0 : value;
}

// Have the team do rows one after another: all of them (phase 0), or those that are marked as
// unfinished in a column of their values (phase 1).
template <class DO>
DEVICE void each_row(const Call& call, int64 column, DO compute)
{
    const int64 step = block_count();
    // Each thread looks at a row, and then all compute those that are to be done.
    for (int64 first = block_index(); first < call.count; first += step * THREADS) {
        const int64 mine = first + thread_index() * step;
        bool wanted = mine < call.count;
        if (wanted && call.phase == 1)
            wanted = is_unfinished(call.values[mine * call.columns + column]);
        for (;;) {
            const float rank = wanted ? static_cast<float>(THREADS - thread_index()) : 0.0f;
            const int next = THREADS - static_cast<int>(team_larger(rank));
            if (next == THREADS)
                break;
            wanted = wanted && thread_index() != next;
            compute(first + next * step);
        }
    }
}
