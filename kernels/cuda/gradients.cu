// The value of one of the TERMS for a pair of rows, and its gradients: one read and one write.
//
// TO_P and TO_Q say with respect to whose logits; gradients have the types of the logits.
// parameters[0] is beta, the order of Renyi divergences less 1, [1] and [2] are the factors of both
// sides, to which [3] adds that many of S = sum p**alpha q**(1-alpha); [5] and [6] the entries of
// their rows, of which those beyond the width are 0. A row that is not read has gradient 0.
//
// Of two columns the first has the value, the second UNFINISHED where the gradient is left to
// `exact_gradients`, whose logits are then what they were: the gradient may be written over them.
//
// Where q - p is all that is asked for, of KL, it is written while the value is summed. Else a
// gradient is known after the value, and written in a pass of its own. Either way it is measured
// while it is written, and where it is not right corrected and written again, from the rows that are
// kept. What cannot be kept is measured first, and written once.

// Error of a gradient, as a share of its largest entry, that is left to what cannot be seen.
constexpr double TOLERANCE = 5e-6;
// Gradients that are multiples of more than this, or whose entries are all below the other.
constexpr double LARGEST_FACTOR = 1e30, SMALLEST_ENTRY = 1e-30;

// Rows whose differences float32 rounds carry that along from the start; only of others is there a
// second version of the loops.
constexpr bool WIDE = Entry<DTYPE_P>::size == 4 && Entry<DTYPE_Q>::size == 4;
constexpr bool FUSED = has(KL) && TO_Q && !TO_P;

// Where the gradient of a part of a row goes.
template <int DTYPE>
struct Target {
    char* at;  // of vector 0
    int skew, last, end;

    DEVICE Target(const Rows& into, const Share& share, const PairOfRows& rows)
        : at(const_cast<char*>(row_address(into, share.row)) +
             (share.first - rows.skew) * Entry<DTYPE>::size),
          skew(rows.skew), last(rows.vectors - 1), end(rows.end)
    {
    }

    DEVICE void store(int vector, const Packed<DTYPE, VECTOR>& entries) const
    {
        entries.store(at + static_cast<int64>(vector) * (VECTOR * Entry<DTYPE>::size),
                      vector == 0 ? skew : 0, vector < last ? VECTOR : vector == last ? end : 0);
    }
    DEVICE void store(int vector, const float (&g)[VECTOR]) const
    {
        Packed<DTYPE, VECTOR> entries;
        entries.pack(g);
        store(vector, entries);
    }
};

// Entries [first, width) of a row are 0.
template <int DTYPE>
OUTLINED void clear(const Rows& into, int64 row, int64 first, int64 width)
{
    char* at = const_cast<char*>(row_address(into, row));
    for (int64 j = first + team_rank(); j < width; j += TEAM)
        store_as(at + j * Entry<DTYPE>::size, DTYPE, 0.0);
}

// What a pass has found of each gradient: the sum of its entries, the largest one, and how wrong
// one may be.
struct Found {
    double sum[2], largest[2], noise[2];
};
// What all threads of a row know, after its constants and the verdict on its value.
struct Known {
    double value;
    Found found;
};
DEVICE Known& row_known(const Call& call)
{
    return *reinterpret_cast<Known*>(&row_verdict(call) + 1);
}
static_assert(EXCHANGE * 2 / 3 + sizeof(Constants) + sizeof(Verdict) + sizeof(Known) <= EXCHANGE,
              "more than a team's place in shared memory");

DEVICE void tell(const Call& call, double (&sum)[2], double (&largest)[2], double (&noise)[2])
{
    row_join<Add>(sum, team_exchange(call));
    row_join<Larger>(largest, team_exchange(call));
    row_join<Larger>(noise, team_exchange(call));
    if (team_rank() == 0)
        row_known(call).found = {{sum[0], sum[1]}, {largest[0], largest[1]}, {noise[0], noise[1]}};
    team_barrier();
}

// How much y - x may be off where it is about c, in nats.
DEVICE double rounding_of(const Constants& constants, bool exactly)
{
    return exactly ? 0.0 : fabs(constants.C) * (LOG_OF_2 * 6e-8);
}

// --- q - p, while the value is summed --------------------------------------------------------

// Writes it times a factor; NaN: not at all.
struct Differences {
    Target<DTYPE_Q> into;
    float factor, largest = 0.0f;
    float g[VECTOR];

    DEVICE Differences(const Call& call, const Share& share, const Piece& piece, float factor)
        : into(call.into_q, share, piece.rows), factor(factor)
    {
    }
    DEVICE void see(int i, float change)
    {
        largest = larger(largest, fabs(change));
        g[i] = change * factor;
    }
    DEVICE void end(int vector) const
    {
        if (factor == factor)
            into.store(vector, g);
    }
    DEVICE float result() const { return largest; }
};

// --- a pass of its own -----------------------------------------------------------------------

template <bool EXACTLY>
OUTLINED void pass(const Call& call, Share share, Slope<true> slope_p, Slope<false> slope_q,
                   float factor_p, float factor_q, bool writes)
{
    const Piece piece(call, share);
    const float a = factor(call);
    const Constants& constants = row_constants(call);
    const Split kx(constants.of_x.k), ky(constants.of_y.k), c(constants.C);
    // C was corrected by a sum whose terms' rounding is in proportion to them.
    const double doubt =
        LOG2_OF_E * rounding_of(constants, EXACTLY) + 1e-6 * row_known(call).value + 1e-11;
    const Integrand<true> of_p(slope_p, a, call.parameters[0], doubt);
    const Integrand<false> of_q(slope_q, a, call.parameters[0], doubt);
    const Target<DTYPE_P> into_p(call.into_p, share, piece.rows);
    const Target<DTYPE_Q> into_q(call.into_q, share, piece.rows);
    double sum[2] = {0.0, 0.0};
    float largest_p = 0.0f, largest_q = 0.0f, noise_p = 0.0f, noise_q = 0.0f;

    for (int vector = team_rank(); vector < piece.rows.vectors;) {
        float few_p = 0.0f, few_q = 0.0f;
#pragma unroll 1
        for (int n = 0; n < BLOCK && vector < piece.rows.vectors; ++n, vector += TEAM) {
            float x[VECTOR], y[VECTOR];
            piece.fetch(vector, x, y);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                At at;
                at.u = fma32(x[i], a, kx.whole) + kx.rest;
                at.v = fma32(y[i], a, ky.whole) + ky.rest;
                at.y = y[i];
                at.d = y[i] - x[i];
                at.lost = EXACTLY ? larger(Difference32(y[i], x[i]).lost, -1e30f) : 0.0f;
                at.t = fma32(at.d, a, c.whole) + fma32(at.lost, a, c.rest);
                if constexpr (TO_P) {
                    x[i] = of_p.entry(at, noise_p);
                    few_p += x[i];
                    largest_p = larger(largest_p, fabs(x[i]));
                    x[i] *= factor_p;
                }
                if constexpr (TO_Q) {
                    y[i] = of_q.entry(at, noise_q);
                    few_q += y[i];
                    largest_q = larger(largest_q, fabs(y[i]));
                    y[i] *= factor_q;
                }
            }
            if (TO_P && writes)
                into_p.store(vector, x);
            if (TO_Q && writes)
                into_q.store(vector, y);
        }
        sum[0] += double_of(few_p);
        sum[1] += double_of(few_q);
    }
    double largest[2] = {double_of(largest_p), double_of(largest_q)};
    double noise[2] = {double_of(noise_p), double_of(noise_q)};
    tell(call, sum, largest, noise);
}

// Put the logits back where a gradient has taken their place.
OUTLINED void restore(const Call& call, Share share)
{
    const Piece piece(call, share);
    const Target<DTYPE_P> into_p(call.into_p, share, piece.rows);
    const Target<DTYPE_Q> into_q(call.into_q, share, piece.rows);
    for (int vector = team_rank(); vector < piece.resident; vector += TEAM) {
        if (TO_P && into_p.at == piece.rows.x)
            into_p.store(vector, piece.room.p[vector]);
        if (TO_Q && into_q.at == piece.rows.y)
            into_q.store(vector, piece.room.q[vector]);
    }
}

// --- a row -----------------------------------------------------------------------------------

// A row, by all of its threads: they come to the same conclusions.
struct Work {
    const Call& call;
    const Share& share;
    bool exactly = WIDE, wrote = false, done = false;

    DEVICE Work(const Call& call, const Share& share) : call(call), share(share) {}

    // Whether all of the row lies in shared memory.
    DEVICE bool kept() const
    {
        return Share::most(call) + 2 * VECTOR - 2 < (call.resident / VECTOR + 1) * VECTOR;
    }
    DEVICE double beta() const { return call.parameters[0]; }

    // What entries are multiplied with, given the value in base 2.
    DEVICE double factor_of(int side, double value) const
    {
        const double scale = call.scales ? call.scales[share.row] : 1.0;
        const double of_s = call.parameters[3] != 0.0 ? exp2_called(beta() * value) : 1.0;
        return scale * call.parameters[1 + side] * call.p.inverse_temperature * of_s;
    }

    // Whether a gradient is as it should be, with what one of its entries may be off besides.
    DEVICE bool good(int side, double factor) const
    {
        const Constants& constants = row_constants(call);
        const Found& found = row_known(call).found;
        const double share = side == 0 ? constants.of_x.share : constants.of_y.share;
        const double error =
            (fabs(found.sum[side]) + rounding_of(constants, exactly)) * share + found.noise[side];
        const double size = found.largest[side];
        return error <= TOLERANCE * size && fabs(factor) < LARGEST_FACTOR &&
               (factor == 0.0 || size == 0.0 || fabs(factor) * size > SMALLEST_ENTRY);
    }

    template <bool EXACTLY>
    DEVICE void sum_and_write(double factor)
    {
        // Without the rest of kx and ky, all terms are that much smaller.
        const Constants& constants = row_constants(call);
        if (!EXACTLY)
            factor *= exp2_called(0.5 * (double_of(Split(constants.of_x.k).rest) +
                                  double_of(Split(constants.of_y.k).rest)));
        wrote = wrote || factor == factor;
        const double of_thread = double_of(sum_terms<EXACTLY, Differences>(
            call, share, float_of(UNIT * factor)));
        double largest[2] = {0.0, UNIT * of_thread}, none[2] = {0.0, 0.0};
        double sum[2] = {0.0, team_rank() == 0 && share.part == 0
                                  ? UNIT * row_sums(call)[PLACE<SUM_D>]
                                  : 0.0};
        tell(call, sum, largest, none);
    }

    // Sum the terms, and where it is FUSED write the difference.
    DEVICE void sum(double factor)
    {
        if constexpr (FUSED) {
            if (exactly)
                sum_and_write<true>(factor);
            else
                sum_and_write<WIDE>(factor);
        } else if (exactly) {
            sum_terms<true>(call, share);
        } else {
            sum_terms<WIDE>(call, share);
        }
    }

    DEVICE void balance()
    {
        if (team_rank() == 0) {
            Constants& constants = row_constants(call);
            if (!exactly)
                constants.C = double_of(Split(constants.C).whole);
            constants.balance(UNIT * row_sums(call)[PLACE<SUM_D>]);
        }
        team_barrier();
    }

    // Find the value, as two_phase does, and where it is FUSED write the gradient: whether that is
    // done.
    DEVICE bool find_value()
    {
        constexpr int PLAIN = 0, EXACTLY = 1, BALANCED = 2, LAST = 3;
        for (int attempt = WIDE ? EXACTLY : PLAIN;; ++attempt) {
            exactly = attempt >= EXACTLY;
            if (attempt >= BALANCED)  // by the sums of the attempt before
                balance();
            sum(kept() ? factor_of(1, 0.0) : NAN64);
            if (team_rank() == 0)
                row_verdict(call) =
                    finish(call, share.row, exactly, &row_known(call).value, false);
            team_barrier();
            const bool right = !FUSED || good(1, factor_of(1, 0.0));
            if ((row_verdict(call).again || !right) && attempt < LAST)
                continue;
            if (row_known(call).value < UNDERFLOW && row_differs(call, share))
                return false;
            if (is_unfinished(row_known(call).value) || !right)
                return false;
            if (FUSED && !kept())
                sum(factor_of(1, 0.0));
            return true;
        }
    }

    // Write gradients that depend on the value.
    DEVICE bool write()
    {
        if (!SECOND_ORDER || exactly)
            balance();
        double value = row_known(call).value;
        if (has(HELLINGER2))
            value = -2.0 * log1p_called(-value);
        const Constants& constants = row_constants(call);
        Slope<true> slope_p(constants, value, beta());
        Slope<false> slope_q(constants, value, beta());
        bool right = false;
        for (int attempt = 0; attempt < 4; ++attempt) {
            const double factor_p = factor_of(0, TILTED ? slope_p.divergence(constants, beta()) : 0.0);
            const double factor_q = factor_of(1, TILTED ? slope_q.divergence(constants, beta()) : 0.0);
            const bool writes = right || (kept() && (attempt > 0 || !GUESSED));
            const float of_p = float_of(factor_p), of_q = float_of(factor_q);
            wrote = wrote || writes;
            if (exactly)
                pass<true>(call, share, slope_p, slope_q, of_p, of_q, writes);
            else
                pass<WIDE>(call, share, slope_p, slope_q, of_p, of_q, writes);
            const Found& found = row_known(call).found;
            right = (!TO_P || good(0, factor_p)) && (!TO_Q || good(1, factor_q));
            if (right && writes)
                return true;
            if (!right) {
                slope_p.correct(found.sum[0], beta());
                slope_q.correct(found.sum[1], beta());
            }
        }
        return false;
    }
};

// Write what is known of a row: its value, and whether its gradient is right.
DEVICE void report(const Call& call, const Share& share, double value, double mark)
{
    if (team_rank() == 0 && share.part == 0) {
        double* results = call.values + share.row * call.columns;
        results[0] = value;
        results[1] = mark;
    }
}

KERNEL(THREADS, BLOCKS) gradients(ARGUMENT Call call)
{
    for (int64 item = block_index() * TEAMS + team_in_block(); item < call.count * CLUSTER;
         item += block_count() * TEAMS) {
        const Share share(call, item);
        const bool reads = is_read(call, share.row);
        if (share.part == 0) {
            const int64 first = reads ? call.width : 0;
            if (TO_P)
                clear<DTYPE_P>(call.into_p, share.row, first, static_cast<int64>(call.parameters[5]));
            if (TO_Q)
                clear<DTYPE_Q>(call.into_q, share.row, first, static_cast<int64>(call.parameters[6]));
        }
        if (!reads) {
            report(call, share, NAN64, 0.0);
            continue;
        }
        find_constants(call, share);
        Work work(call, share);
        if (!row_constants(call).good() || !work.find_value()) {
            report(call, share, UNFINISHED, UNFINISHED);
        } else {
            const double value = row_known(call).value;
            work.done = FUSED || work.write();
            report(call, share, value, work.done ? 0.0 : UNFINISHED);
        }
        if (!work.done && work.wrote)
            restore(call, share);
        team_barrier();  // before anyone has the constants of the next row there
    }
}
