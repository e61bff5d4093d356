// A pair of rows whose normalizers are found while it is read, and which is kept to be read again.
//
// The first `resident` entries of each part of it stay in shared memory; those beyond come from L2,
// or as far as it does not hold them from device memory. CLUSTER blocks share a row, or (phase 1,
// then phase 2) `parts` blocks that know of each other only from one launch to the next. TOP_P and
// TOP_Q say whether the largest entries are asked for.
//
// With a = log2(e)/T and constants kx, ky from the normalizers, log2 p = a x + kx, log2 q = a y + ky
// and t = log2(q/p) = a (y - x) + C. All steps are symmetric in the two rows or change sign only.

#pragma once

// A block's sum of exponentials beyond this has its reference moved.
constexpr float LARGE = 4096.0f;

// Numbers in the state of a part: of the first phase, and from here on of the second.
constexpr int STATE = 64, SECOND = 8;

// log2(e)/T: what entries are multiplied with.
DEVICE float factor(const Call& call)
{
    return float_of(call.p.inverse_temperature * LOG2_OF_E);
}

// --- a row, by the threads of a team, and by the teams of a cluster --------------------------

// Shared memory of a team: what it shows to the other blocks of the cluster, the sums of the row, its
// constants, and then vectors.
constexpr int EXCHANGE = 768;
DEVICE char* team_shared(const Call& call)
{
    const int resident = static_cast<int>(call.resident / VECTOR);
    const int size = EXCHANGE + resident * static_cast<int>(sizeof(PairOfVectors));
    return reinterpret_cast<char*>(kernel_shared()) + team_in_block() * size;
}
DEVICE double* team_exchange(const Call& call)
{
    return reinterpret_cast<double*>(team_shared(call));
}

struct Two {
    double first, second;
};

// Join two numbers of every thread of a row.
template <class JOIN>
OUTLINED Two row_joined(Two of_thread, double* shared)
{
    double values[2] = {of_thread.first, of_thread.second};
    team_join<JOIN>(values);
    if constexpr (CLUSTER > 1) {
        if (thread_index() == 0) {
            shared[0] = values[0];
            shared[1] = values[1];
        }
        cluster_barrier();
        for (int rank = 0; rank < CLUSTER; ++rank) {
            const double* other = in_block(shared, rank);
            values[0] = rank ? JOIN::join(values[0], other[0]) : other[0];
            values[1] = rank ? JOIN::join(values[1], other[1]) : other[1];
        }
        cluster_barrier();  // before anyone writes there again
    }
    return {values[0], values[1]};
}
template <class JOIN>
DEVICE void row_join(double (&values)[2], double* shared)
{
    const Two joined = row_joined<JOIN>({values[0], values[1]}, shared);
    values[0] = joined.first;
    values[1] = joined.second;
}

DEVICE Top row_top(Top top, double* shared)
{
    top = team_top(top);
    if constexpr (CLUSTER > 1) {
        Top* mine = reinterpret_cast<Top*>(shared);
        if (thread_index() == 0)
            *mine = top;
        cluster_barrier();
        for (int rank = 0; rank < CLUSTER; ++rank)
            top = better(top, *in_block(mine, rank));
        cluster_barrier();
    }
    return top;
}

// The part of a pair of rows that a team has to do with: all of it, that of a block of a cluster, or
// one of the parts of the launch.
struct Share {
    int64 row, part, first, width;

    DEVICE Share(const Call& call, int64 item)
    {
        const int64 shares = CLUSTER > 1 ? CLUSTER : call.parts;
        const int64 each = most(call);
        row = item / shares;
        part = item % shares;
        first = part * each < call.width ? part * each : call.width;
        width = call.width - first < each ? call.width - first : each;
    }

    // Entries of one, at most.
    static DEVICE int64 most(const Call& call)
    {
        return CLUSTER > 1 ? (call.width + CLUSTER * VECTOR - 1) / (CLUSTER * VECTOR) * VECTOR
               : call.parts > 1 ? call.part_width
                                : call.width;
    }
};

// Its entries, of which the first ones lie in shared memory.
struct Piece {
    PairOfRows rows;
    Room room;
    int resident;

    DEVICE Piece(const Call& call, const Share& share)
        : rows(call, share.row, share.first, share.width),
          room(reinterpret_cast<Bytes16*>(team_shared(call) + EXCHANGE),
               static_cast<int>(call.resident / VECTOR)),
          resident(static_cast<int>(call.resident / VECTOR))
    {
        resident = resident < rows.vectors ? resident : rows.vectors;
    }

    DEVICE void fetch(int vector, float (&x)[VECTOR], float (&y)[VECTOR]) const
    {
        if (vector < resident)
            room.unpack(vector, x, y);
        else
            rows.load(vector).unpack(x, y);
    }
};

// --- the first phase -------------------------------------------------------------------------

// What of a row's exponentials 2**(a x + k) a thread, or a part, has summed.
struct Summed {
    double k = 0.0, S = 0.0;
    double largest = 0.0;  // sum of a few
    Top top = {-INFINITY32, 1ll << 62};
};

// log2 p = a x + k; how much of the sum the largest few entries are; the top.
struct Normalizer {
    double k, share;
    Top top;

    // To and from the state of a part.
    DEVICE void store(double* state) const
    {
        state[0] = k;
        state[1] = share;
        state[2] = double_of(top.value);
        state[3] = static_cast<double>(top.index);
    }
    template <bool WITH_TOP>
    static DEVICE Summed load(const double* states, int64 parts)
    {
        Summed sum;
        double least = -INFINITY64;
        for (int64 i = team_rank(); i < parts; i += TEAM)
            least = larger(least, -states[i * STATE]);
        sum.k = -least;
        for (int64 i = team_rank(); i < parts; i += TEAM) {
            const double* state = states + i * STATE;
            const double part = state[0] == INFINITY64 ? 0.0 : exp2_called(sum.k - state[0]);
            sum.S += part;
            sum.largest = larger(sum.largest, state[1] * part);
            if (WITH_TOP)
                sum.top = better(sum.top, {float_of(state[2]), static_cast<int64>(state[3])});
        }
        return sum;
    }
};

// log2 p = a x + kx, log2 q = a y + ky, log2(q/p) = a (y - x) + C.
struct Constants {
    Normalizer of_x, of_y;
    double C;

    // Of what all threads of a row have summed.
    DEVICE Constants(const Summed& x, const Summed& y, double* shared)
    {
        double least[2] = {x.S == 0.0 ? -INFINITY64 : -x.k, y.S == 0.0 ? -INFINITY64 : -y.k};
        row_join<Larger>(least, shared);
        const double scale_x = x.S == 0.0 ? 0.0 : exp2_called(-least[0] - x.k);
        const double scale_y = y.S == 0.0 ? 0.0 : exp2_called(-least[1] - y.k);
        double sum[2] = {x.S * scale_x, y.S * scale_y};
        row_join<Add>(sum, shared);
        double share[2] = {x.largest * scale_x, y.largest * scale_y};
        row_join<Larger>(share, shared);
        of_x = {-least[0] - log2(sum[0]), share[0] / sum[0], x.top};
        of_y = {-least[1] - log2(sum[1]), share[1] / sum[1], y.top};
        if (TOP_P)
            of_x.top = row_top(x.top, shared);
        if (TOP_Q)
            of_y.top = row_top(y.top, shared);
        C = of_y.k - of_x.k;
    }

    DEVICE bool good() const { return fabs(of_x.k) < INFINITY64 && fabs(of_y.k) < INFINITY64; }

    // Have the sum of q - p, which is D, vanish.
    DEVICE void balance(double D) { C -= 2.0 * LOG2_OF_E * atanh(0.5 * D); }
};

// The exponentials of one row.
struct Exponentials : Summed {
    float reference = 0.0f;  // e = 2**(a x + reference)
    float bound = 0.0f;      // what no entry before has been beyond
    float least = 0.0f;      // what entries beyond it come to at least, however they are rounded
    float few = 0.0f;        // the largest sum of a few of them

    // What they come to.
    DEVICE Summed summed() const
    {
        Summed result = *this;
        result.k = double_of(reference);
        result.largest = double_of(few);
        return result;
    }

    DEVICE void start(const float (&x)[VECTOR], float a)
    {
        bound = largest_of(x);
        const float of_tile = team_larger(bound);
        // Who has it takes it as a top.
        bound = bound == of_tile ? -INFINITY32 : of_tile;
        if (of_tile > -INFINITY32) {
            reference = -of_tile * a;
            S = reference > -INFINITY32 ? 0.0 : NAN64;
        }
        find_least(a);
    }
    DEVICE void find_least(float a)
    {
        least = 0.9999f * exp2_approx(fma32(bound, a, reference));
    }

    // The sum of the exponentials of a vector; SEES a new top among them, which there is none of
    // where they come to no more than the old one.
    template <bool SEES>
    DEVICE float add(const float (&x)[VECTOR], int64 first, float a)
    {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float e = exp2_approx(fma32(x[i], a, reference));
            sum = i ? sum + e : e;
        }
        if (SEES && !(sum <= least)) {
            const float found = largest_of(x);
            if (found > bound) {
                bound = found;
                top = {found, first + place_of(x, found)};
                find_least(a);
            }
        }
        return sum;
    }

    // Have a reference that an entry does not go beyond.
    DEVICE void refer_to(float entry, float a)
    {
        const float moved = -entry * a;
        if (!(moved < reference))
            return;
        const double factor = exp2_called(double_of(moved) - double_of(reference));
        S = moved > -INFINITY32 ? S * factor : NAN64;
        few *= float_of(factor);
        reference = moved;
        find_least(a);
    }

    DEVICE void add(float sum)
    {
        S += double_of(sum <= LARGE ? sum : NAN32);
        few = larger(few, sum);
    }
};

// Sums of exponentials of both rows over the vectors first, first + TEAM, ... before `stop`.
struct SumsOfFew {
    float x = 0.0f, y = 0.0f;

    DEVICE SumsOfFew(const Piece& piece, int first, int stop, float a, Exponentials& of_x,
                     Exponentials& of_y)
    {
        for (int vector = first; vector < stop; vector += TEAM) {
            float entry_x[VECTOR], entry_y[VECTOR];
            piece.fetch(vector, entry_x, entry_y);
            x += of_x.add<TOP_P>(entry_x, piece.rows.index(vector), a);
            y += of_y.add<TOP_Q>(entry_y, piece.rows.index(vector), a);
        }
    }
    DEVICE bool fit() const { return x <= LARGE && y <= LARGE; }
};

DEVICE void copy(const Piece& piece, int first)
{
    const PairOfRows& rows = piece.rows;
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
        const int vector = first + i * TEAM;
        if (vector < piece.resident)
            rows.copy(vector, piece.room, vector);
    }
    end_batch();
}

DEVICE void read(const Piece& piece, float a, Exponentials& of_x, Exponentials& of_y)
{
    constexpr int STEP = BLOCK * TEAM;
    const int vectors = piece.rows.vectors;
    copy(piece, team_rank());
    await_batches<0>();
    float x[VECTOR], y[VECTOR];
    piece.fetch(team_rank(), x, y);
    of_x.start(x, a);
    of_y.start(y, a);
    copy(piece, team_rank() + STEP);
    for (int first = team_rank(); first < vectors; first += STEP) {
        const int stop = first + STEP < vectors ? first + STEP : vectors;
        for (bool once_more = true;; once_more = false) {
            const SumsOfFew sums(piece, first, stop, a, of_x, of_y);
            if (sums.fit() || !once_more) {
                of_x.add(sums.x);
                of_y.add(sums.y);
                break;
            }
            float largest_x = -INFINITY32, largest_y = -INFINITY32;
            for (int vector = first; vector < stop; vector += TEAM) {
                piece.fetch(vector, x, y);
                largest_x = larger(largest_x, largest_of(x));
                largest_y = larger(largest_y, largest_of(y));
            }
            of_x.refer_to(largest_x, a);
            of_y.refer_to(largest_y, a);
        }
        copy(piece, first + 2 * STEP);
        await_batches<1>();
    }
    await_batches<0>();
}

// --- what all threads of a row know ----------------------------------------------------------

// A number in float32, and what that leaves.
struct Split {
    float whole, rest;

    DEVICE Split(double number) : whole(float_of(number)), rest(float_of(number - whole)) {}
};

// The constants of a row lie in shared memory.
DEVICE Constants& row_constants(const Call& call)
{
    return *reinterpret_cast<Constants*>(team_exchange(call) + EXCHANGE / 12);
}

// Whether the rows differ anywhere, as numbers, by what was kept of them; not for `parts`.
OUTLINED bool row_differs(const Call& call, Share share)
{
    const Piece piece(call, share);
    double found[2] = {0.0, 0.0};
    for (int vector = team_rank(); vector < piece.rows.vectors; vector += TEAM) {
        float x[VECTOR], y[VECTOR];
        piece.fetch(vector, x, y);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            found[0] = x[i] != y[i] ? 1.0 : found[0];
    }
    row_join<Larger>(found, team_exchange(call));
    return found[0] > 0.0;
}

// Find the constants of a row, or in phase 1 those of a part.
OUTLINED void find_constants(const Call& call, Share share)
{
    double* states = call.states + share.row * call.parts * STATE;
    double* shared = team_exchange(call);
    Summed x, y;
    if (call.phase == 2) {
        x = Normalizer::load<TOP_P>(states, call.parts);
        y = Normalizer::load<TOP_Q>(states + SECOND / 2, call.parts);
    } else {
        Exponentials of_x, of_y;
        read(Piece(call, share), factor(call), of_x, of_y);
        x = of_x.summed();
        y = of_y.summed();
        x.top.index += share.first;
        y.top.index += share.first;
    }
    const Constants constants(x, y, shared);
    if (call.phase == 1 && team_rank() == 0) {
        constants.of_x.store(states + share.part * STATE);
        constants.of_y.store(states + share.part * STATE + SECOND / 2);
    }
    team_barrier();
    if (team_rank() == 0)
        row_constants(call) = constants;
    team_barrier();
}
