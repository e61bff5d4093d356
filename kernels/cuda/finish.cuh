// What users asked for, from the values of a row: the formulas that come after the sums.

#pragma once

// Codes are known to plans.py.
enum Formula {
    SAME,
    SCALED,
    POWER,
    INFINITE_POWER,
    ZERO,
    ENTROPY,
    LOGSUMEXP,
    TOP_P,
    TOKEN,
    NLL,
    SAME_TOP,
    DELTA_PROB,
};

// The columns of STATISTICS: the largest entry m; S = sum exp(x - m) and U = sum (m - x) exp(x - m)
// over all entries but that one; its index; x - m of the token. Where a row is not a distribution
// m is NaN, and so is everything that follows from it.
DEVICE double log_normalizer(const double* row)
{
    return row[0] == row[0] ? log1p_called(row[1]) : row[0];
}

DEVICE double token_log_prob(const double* row) { return row[4] - log_normalizer(row); }

// (S - 1)/beta times a scale, where log S is beta times a Renyi divergence, that is `factor` times
// the value.
DEVICE double power(double value, double beta, double factor, double scale)
{
    const double log_s = beta * factor * value;
    const double excess = expm1(log_s);
    // expm1(z)/z is 1 where z vanishes; far from there the sum S itself is used.
    if (fabs(log_s) < 1.0)
        return (log_s == 0.0 ? 1.0 : excess / log_s) * (factor * scale) * value;
    return excess / beta * scale; // scale/beta alone may underflow
}

// The result for one row; `other` are its values from a second kernel, or of its second row.
DEVICE double finished(int code, const double* row, const double* other, const double* parameters)
{
    switch (code) {
    case SCALED: return parameters[0] * row[0];
    case POWER: return power(row[0], parameters[0], parameters[1], parameters[2]);
    case INFINITE_POWER: return row[0] > 0.0 ? INFINITY64 : row[0];
    case ZERO: return row[0] == row[0] ? 0.0 : row[0];
    case ENTROPY: return log_normalizer(row) + row[2] / (1.0 + row[1]);
    case LOGSUMEXP: return row[0] + log_normalizer(row);
    case TOP_P: return row[0] == row[0] ? 1.0 / (1.0 + row[1]) : row[0];
    case TOKEN: return token_log_prob(row);
    case NLL: return 0.0 - token_log_prob(row);
    case SAME_TOP:
        return row[0] == row[0] && other[0] == other[0] ? (row[3] == other[3] ? 1.0 : 0.0) : NAN64;
    case DELTA_PROB: return exp(token_log_prob(other)) - exp(token_log_prob(row));
    default: return row[0];
    }
}
