// Gradients of a pair of rows with respect to the logits: what one entry of them is.
//
// In base 2, with u = log2 p, v = log2 q, t = v - u, z the same with another constant, L = log 2 and
// W the mean of what it is subtracted from, the entries are, up to factors,
//
//     KL, cross-entropy  wrt q  q - p                    wrt p  -L p z
//     Renyi, Hellinger   wrt q  q - r                    wrt p  r - p
//     Jeffreys           wrt q  L q z + (q - p)          wrt p  -L p z - (q - p)
//     JS                 wrt q  q (log(q/m) - W)         wrt p  p (log(p/m) - W)
//     TV                 wrt q  q (sign(t)/2 - W)        wrt p  p (-sign(t)/2 - W)
//
// where r = p**alpha q**(1-alpha)/S is p 2**(-(alpha-1) z) and q 2**(-alpha z), and p is q 2**-z.
// Entries of a gradient add up to 0, and all of them depend on one number that is not known well:
// the mean, or the constant of z, in which it is. So a sum that is not 0 corrects it.

#pragma once

constexpr bool TILTED = has(RENYI) || has(HELLINGER2);
constexpr bool CROSS = has(CROSS_ENTROPY), OF_KL = has(KL) || CROSS;
constexpr bool CENTRED = has(JS) || has(TV);
// Whether the first guess of the number is no good.
constexpr bool GUESSED = CENTRED || has(JEFFREYS);

// One entry of both rows, once the normalizers are known: y - x, and what its rounding lost.
struct At {
    float u, v, t, y, d, lost;
};

// log 2 - log1p(2**-tau) = log(p/m) of the larger one of p and q, for tau >= 0; 1.3e-7.
DEVICE float log_of_larger(float tau)
{
    if (tau > 2.0f) {
        const float g = exp2_approx(-tau);
        return static_cast<float>(LOG_OF_2) - log1p_quarter(g);
    }
    float k = fma32(tau, 5.7438446674495935e-06f, -4.936764162266627e-05f);
    k = fma32(k, tau, 1.1248975170019548e-05f);
    k = fma32(k, tau, 0.0011958250543102622f);
    k = fma32(k, tau, 1.870747837529052e-06f);
    k = fma32(k, tau, -0.06005684286355972f);
    return fma32(k, tau, 0.3465735912322998f) * tau;
}

// q - p.
DEVICE float change_of(const At& at)
{
    const float tau = smaller(fabs(at.t), FARTHEST);
    return sign_of(exp2_approx(larger(at.u, at.v)) * one_minus_exp2(tau), at.t);
}

// The gradient with respect to one row, whose entries are known but for a number.
template <bool OF_P>
struct Slope {
    double number;

    // e = -order z.
    static DEVICE double order(double beta) { return TILTED ? (OF_P ? beta : beta + 1.0) : 1.0; }

    // From the value, in nats.
    DEVICE Slope(const Constants& constants, double value, double beta)
    {
        constexpr double SIGN = OF_P ? 1.0 : -1.0;
        const double mean = value * LOG2_OF_E;
        if (TILTED)
            number = constants.C + (OF_P ? mean : mean * (beta / (beta + 1.0)));
        else if (has(JEFFREYS))
            number = constants.C + SIGN * 0.5 * mean;
        else if (has(JS))
            number = value;
        else if (has(TV))
            number = 0.0;
        else if (OF_P)
            number = (CROSS ? constants.of_y.k : constants.C) + mean;
        else
            number = constants.C;
    }

    // Take away what the sum of the entries shows.
    DEVICE void correct(double sum, double beta)
    {
        if (CENTRED)
            number += sum;
        else if (TILTED || (OF_KL && !OF_P))
            number += log1p_called(OF_P ? sum : -sum) * LOG2_OF_E / order(beta);
        else
            number += (OF_P ? sum : -sum) * LOG2_OF_E;
    }

    // log(S)/(alpha-1) in base 2.
    DEVICE double divergence(const Constants& constants, double beta) const
    {
        return (number - constants.C) * (OF_P ? 1.0 : (beta + 1.0) / beta);
    }
};

template <bool OF_P>
struct Integrand {
    Split number;
    float a, order, doubt, upper, lower;

    // `doubt` of t: below it its sign is not certain.
    DEVICE Integrand(const Slope<OF_P>& slope, float a, double beta, double doubt)
        : number(slope.number), a(a), order(float_of(slope.order(beta))), doubt(float_of(doubt)),
          upper(float_of(0.5 - slope.number)), lower(float_of(-0.5 - slope.number))
    {
    }

    // An entry; `noise` grows to how wrong one may be.
    DEVICE float entry(const At& at, float& noise) const
    {
        const float own = OF_P ? at.u : at.v;
        if constexpr (has(TV)) {
            const float mass = exp2_approx(own), t = OF_P ? -at.t : at.t;
            if (fabs(t) < doubt)
                noise = larger(noise, t == 0.0f ? 0.0f : mass);
            return mass * (t > 0.0f ? upper : t < 0.0f ? lower : -number.whole);
        }
        if constexpr (has(JS)) {
            const float tau = smaller(fabs(at.t), FARTHEST), larger_one = log_of_larger(tau);
            const bool is_larger = OF_P ? at.t <= 0.0f : at.t >= 0.0f;
            const float log = is_larger ? larger_one
                                        : fma32(tau, -static_cast<float>(LOG_OF_2), larger_one);
            const float mass = exp2_approx(own);
            noise = larger(noise, mass * fabs(log) * 2e-7f);
            return mass * ((log - number.whole) - number.rest);
        }
        float z = CROSS && OF_P ? fma32(at.y, a, number.whole) + number.rest
                                : fma32(at.d, a, number.whole) + fma32(at.lost, a, number.rest);
        z = larger(smaller(z, 1e30f), -1e30f);  // NaN becomes a number; there p and q are 0
        if constexpr (TILTED || (OF_KL && !OF_P)) {
            // Of r, or p, less the row itself.
            const float e = -order * z;
            const float size = exp2_approx(own + larger(e, 0.0f)) *
                               one_minus_exp2(smaller(fabs(e), FARTHEST));
            return sign_of(size, OF_P ? e : -e);
        }
        const float linear = exp2_approx(own) * (z * static_cast<float>(LOG_OF_2));
        if constexpr (has(JEFFREYS))
            return OF_P ? -linear - change_of(at) : linear + change_of(at);
        return -linear;
    }
};
