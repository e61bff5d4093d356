// Elementary functions: of float32 numbers for every entry of a row, of float64 ones for what is
// left of them.
//
// float32 exponents are in base 2. All functions reduce one to t = n + r with a whole n and
// abs(r) <= 1/2 and evaluate one polynomial in r, fitted for the smallest largest relative error
// (which stands beside it); 2**n is put together from its bits, which is exact and leaves the units
// for special functions to those exponentials that need no more than they give.

#pragma once

constexpr double LOG2_OF_E = 1.4426950408889634, LOG_OF_2 = 0.6931471805599453;

// The largest exponent that is told apart: 2**-126 is the smallest normal number.
constexpr float FARTHEST = 126.0f;

// --- float32 --------------------------------------------------------------------------------

// t = n + r, s = 2**n for -126 <= n <= 127; below that s stays where it is.
struct Reduced {
    float n, r, s;

    DEVICE Reduced(float t)
    {
        // Added to this, a number has its whole part in the last bits.
        constexpr float WHOLE = 12582912.0f;
        const float shifted = t + WHOLE;
        n = shifted - WHOLE;
        r = t - n;
        s = as_float((as_bits(larger(shifted, WHOLE - FARTHEST)) << 23) + 0x3f800000u);
    }
};

// (2**r - 1)/log 2 = r + r**2 P(r) of a reduced exponent: P; 1.1e-7.
DEVICE float tail_polynomial(float r)
{
    float p = fma32(r, 0.00022250396033731293f, 0.0019305298518179372f);
    p = fma32(p, r, 0.013876057354467354f);
    p = fma32(p, r, 0.08007507514766778f);
    return fma32(p, r, 0.34657359027997264f);
}

// 2**t = exp(T) and, over log 2, exp(T) - 1, phi = exp(T) - 1 - T and psi = 1 - exp(T) + T exp(T): the
// last two are >= 0, and the second is the first one as seen from the other row. None has a
// cancellation, for t <= 126. With 2**r = 1 + (r + u) log 2, phi is
// s u + [(s - 1) (r + 1/log 2) - n], whose bracket is exactly 0 where n = 0; elsewhere nothing is lost
// because the result is not small.
struct Power {
    float whole, less_1, phi, psi;

    DEVICE Power(float t)
    {
        constexpr float L = static_cast<float>(LOG2_OF_E), LOG_2 = static_cast<float>(LOG_OF_2);
        const Reduced at(t);
        const float u = at.r * (at.r * tail_polynomial(at.r)), less = at.s - 1.0f;
        const float grown = at.r + u;  // (2**r - 1)/log 2
        whole = fma32(at.s * LOG_2, grown, at.s);
        less_1 = fma32(at.s, grown, less * L);
        phi = fma32(at.s, u, fma32(less, at.r + L, -at.n));
        psi = t < -2.0f ? fma32(whole, t, -less_1) : fma32(less_1, t * LOG_2, -phi);
    }
};

DEVICE float phi(float t) { return Power(t).phi; }

// 1 - 2**-tau without cancellation, for 0 <= tau <= 126; 5e-9.
DEVICE float one_minus_exp2(float tau)
{
    const Reduced at(-tau);
    float p = fma32(at.r, 0.0001497050398029387f, 0.001337212510406971f);
    p = fma32(p, at.r, 0.00961929652839899f);
    p = fma32(p, at.r, 0.055504098534584045f);
    p = fma32(p, at.r, 0.24022650718688965f);
    p = fma32(p, at.r, 0.6931471824645996f);
    return fma32(-at.s, at.r * p, 1.0f - at.s);
}

// Terms of symmetric divergences are M k(tau), with M the larger one of p and q and
// tau = abs(log2(p/q)). k of Jensen-Shannon, [(1 + g)(log 2 - log1p(g)) - g tau]/2 in natural units
// with g = exp(-tau): tau**2 times a polynomial up to tau = 2 (4e-8), and beyond from g <= 1/4.
DEVICE float js_near(float tau)
{
    float k = fma32(tau, 4.97996211379359e-07f, -6.252591447264422e-06f);
    k = fma32(k, tau, 4.7387035010615364e-05f);
    k = fma32(k, tau, -0.0004160769749432802f);
    k = fma32(k, tau, 0.0036066104657948017f);
    k = fma32(k, tau, -0.02081403322517872f);
    k = fma32(k, tau, 0.06005662679672241f);
    return k * tau * tau;
}
// log1p(g) for 0 <= g <= 1/4; 1e-8.
DEVICE float log1p_quarter(float g)
{
    float k = fma32(g, -0.10168222337961197f, 0.18768173456192017f);
    k = fma32(k, g, -0.2490830421447754f);
    k = fma32(k, g, 0.3333164155483246f);
    k = fma32(k, g, -0.49999991059303284f);
    return g * fma32(k, g, 1.0f);
}
DEVICE float js_far(float tau)
{
    const float g = exp2_approx(-tau);
    constexpr float HALF_LOG_2 = static_cast<float>(0.5 * LOG_OF_2);
    return fma32(1.0f + g, fma32(log1p_quarter(g), -0.5f, HALF_LOG_2), g * tau * -HALF_LOG_2);
}

// --- float32, where rows are near each other -------------------------------------------------

// Short of reduction, one polynomial does, without a special function: (2**t - 1)/log 2 - t and
// psi(t), over t**2, for abs(t) <= NEAR_ONE; 3e-8 and 2e-8.
constexpr float NEAR_ONE = 1.75f;
DEVICE float near_phi(float t)
{
    float p = fma32(t, 1.4611279652854137e-07f, 1.9665822037495673e-06f);
    p = fma32(p, t, 2.2022719349479303e-05f);
    p = fma32(p, t, 0.0002221211907453835f);
    p = fma32(p, t, 0.0019235913641750813f);
    p = fma32(p, t, 0.013876077719032764f);
    p = fma32(p, t, 0.08007551729679108f);
    return fma32(p, t, 0.3465735912322998f);
}
DEVICE float near_psi(float t)
{
    float p = fma32(t, 9.085280083809266e-08f, 1.2178022643638542e-06f);
    p = fma32(p, t, 1.3360281627683435e-05f);
    p = fma32(p, t, 0.00013193633640184999f);
    p = fma32(p, t, 0.001111100078560412f);
    p = fma32(p, t, 0.007694576866924763f);
    p = fma32(p, t, 0.041628096252679825f);
    p = fma32(p, t, 0.16015098989009857f);
    return fma32(p, t, 0.3465735912322998f);
}

// Seen from g = sqrt(p q), terms of two rows are even functions of t = log2(q/p), or odd ones, whose
// polynomials in s = t**2 are short. With T = t log 2, for s <= NEAR_BOTH**2:
//
//     q - p                 = 2 g sinh(T/2)                   = g t near_difference(s)
//     p phi(T) - q phi(-T)  = 2 g (2 sinh(T/2) - T cosh(T/2)) = 2 g t s near_skewness(s) log 2
//     p phi(T) + q phi(-T)  = 2 g T sinh(T/2)                 = T (q - p)
//     (sqrt q - sqrt p)**2  = 4 g sinh(T/4)**2                = g s near_hellinger2(s)
//     Jensen-Shannon                                          = g s near_js(s)
//
// with phi(T) = exp(T) - 1 - T, so that p phi(T) is a term of KL(P, Q); 4e-8 or better.
constexpr float NEAR_BOTH = 3.0f;
template <bool OVER_LOG_2>
DEVICE float near_difference(float s)
{
    constexpr double UNIT = OVER_LOG_2 ? 1.0 : LOG_OF_2;
    constexpr float A = static_cast<float>(3.538168016348209e-07 * UNIT);
    constexpr float B = static_cast<float>(0.00012017469271086156 * UNIT);
    constexpr float C = static_cast<float>(0.02001895196735859 * UNIT);
    constexpr float D = static_cast<float>(UNIT);
    return fma32(fma32(fma32(s, A, B), s, C), s, D);
}
DEVICE float near_skewness(float s)
{
    float p = fma32(s, -4.697549904619791e-09f, -2.0624088392651174e-06f);
    p = fma32(p, s, -0.0004809072706848383f);
    return fma32(p, s, -0.04003775119781494f);
}
DEVICE float near_hellinger2(float s)
{
    float p = fma32(s, 1.0564627395126536e-08f, 4.812355655303691e-06f);
    p = fma32(p, s, 0.001202267943881452f);
    return fma32(p, s, 0.12011325359344482f);
}
DEVICE float near_js(float s)
{
    float p = fma32(s, -1.3483811289738412e-10f, 7.747744668051837e-09f);
    p = fma32(p, s, -2.8336293667052814e-07f);
    p = fma32(p, s, 1.2023425369989127e-05f);
    p = fma32(p, s, 6.463902302300539e-09f);
    return fma32(p, s, 0.06005662679672241f);
}

// d = y - x, and what its rounding lost (NaN at infinity).
struct Difference32 {
    float value, lost;

    DEVICE Difference32(float y, float x)
    {
        value = y - x;
        const float back = value - y;
        lost = (y - (value - back)) - (x + back);
    }
};

// 2**(a x + k), of which a x + k is at most 126 or the result infinite or NaN: a rounded exponent of
// -33 makes an error of 1.3e-6, so that the whole number is taken off before anything is rounded.
DEVICE float exp2_exactly(float x, float a, float k)
{
    constexpr float WHOLE = 12582912.0f;  // see Reduced
    const float n = (larger(fma32(x, a, k), -FARTHEST) + WHOLE) - WHOLE;
    return exp2_approx(fma32(x, a, k - n)) * exp2_approx(n);
}

// --- float64 --------------------------------------------------------------------------------

// exp(t), exp(t) - 1 and exp(t) - 1 - t >= 0, none with cancellation, for t <= 700. With
// t = n log 2 + r, s = 2**n and exp(r) = 1 + r + u the last one is s u + (s r + (s - 1) - t), whose
// bracket is 0 where n = 0. Far below 0 the exponential is nothing, and only the t that is taken
// away counts.
struct Exponential {
    double whole, less_1, tail;

    DEVICE Exponential(double t)
    {
        const double z = larger(t, -700.0);
        const double n = floor(fma64(z, LOG2_OF_E, 0.5));
        const double r = fma64(n, -1.9082149292705877e-10, fma64(n, -0.6931471803691238, z));
        double u = fma64(r, 1.0 / 6227020800.0, 1.0 / 479001600.0);
        u = fma64(u, r, 1.0 / 39916800.0);
        u = fma64(u, r, 1.0 / 3628800.0);
        u = fma64(u, r, 1.0 / 362880.0);
        u = fma64(u, r, 1.0 / 40320.0);
        u = fma64(u, r, 1.0 / 5040.0);
        u = fma64(u, r, 1.0 / 720.0);
        u = fma64(u, r, 1.0 / 120.0);
        u = fma64(u, r, 1.0 / 24.0);
        u = fma64(u, r, 1.0 / 6.0);
        u = fma64(u, r, 0.5) * r * r;
        const double s = as_double(static_cast<uint64>(static_cast<int64>(n) + 1023) << 52);
        whole = fma64(s, r + u, s);
        less_1 = fma64(s, r + u, s - 1.0);
        tail = fma64(s, u, fma64(s, r, s - 1.0) - t);
    }
};

DEVICE double exponential_tail(double t) { return Exponential(t).tail; }

// The library's functions are long: what is needed once a row, or less, calls one copy of them.
OUTLINED double exp2_called(double z) { return exp2(z); }
OUTLINED double exp_called(double z) { return exp(z); }
OUTLINED double log_called(double z) { return log(z); }
OUTLINED double log1p_called(double z) { return log1p(z); }

// a - log1p(a) >= 0: what Jensen's inequality leaves.
DEVICE double excess(double a) { return a - log1p_called(a); }
