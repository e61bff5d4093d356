// Two rows of logits side by side, cut into vectors of the same entries.

#pragma once

// Vectors that are summed in float32 before their sums go to float64: 32 entries.
constexpr int BLOCK = 32 / VECTOR;

struct PairOfVectors {
    Packed<DTYPE_P, VECTOR> p;
    Packed<DTYPE_Q, VECTOR> q;

    DEVICE void unpack(float (&x)[VECTOR], float (&y)[VECTOR]) const
    {
        p.unpack(x);
        q.unpack(y);
    }
};

// Entries [from, to) of both rows, one by one, and -inf for the others. At the ends of rows, or
// where vectors are not aligned: called from many places, and seldom.
OUTLINED PairOfVectors load_entries(const char* x, const char* y, int from, int to)
{
    PairOfVectors pair;
    pair.p.load_some(x, from, to);
    pair.q.load_some(y, from, to);
    return pair;
}

// Room for vectors of both rows in shared memory.
struct Room {
    Packed<DTYPE_P, VECTOR>* p;
    Packed<DTYPE_Q, VECTOR>* q;

    DEVICE Room(Bytes16* at, int vectors)
        : p(reinterpret_cast<Packed<DTYPE_P, VECTOR>*>(at)),
          q(reinterpret_cast<Packed<DTYPE_Q, VECTOR>*>(p + vectors))
    {
    }

    DEVICE void unpack(int place, float (&x)[VECTOR], float (&y)[VECTOR]) const
    {
        Packed<DTYPE_P, VECTOR>::from(p + place).unpack(x);
        Packed<DTYPE_Q, VECTOR>::from(q + place).unpack(y);
    }
};

// Entries [first, first + width) of a pair of rows, which are cut at multiples of VECTOR. Vector v
// holds the entries from v VECTOR - skew on, the last one ends before its entry number `end`.
struct PairOfRows {
    const char *x, *y;  // vector 0
    int vectors, skew, end;
    int whole_from, whole_to;  // vectors that are loaded at once

    DEVICE PairOfRows(const Call& call, int64 row, int64 first, int64 width)
    {
        x = row_address(call.p, row) + first * Entry<DTYPE_P>::size;
        y = row_address(call.q, row) + first * Entry<DTYPE_Q>::size;
        skew = Row<DTYPE_P, VECTOR>::skew_of(x);
        x -= skew * Entry<DTYPE_P>::size;
        y -= skew * Entry<DTYPE_Q>::size;
        vectors = static_cast<int>((width + skew + VECTOR - 1) / VECTOR);
        end = static_cast<int>(width + skew - (vectors - 1ll) * VECTOR);
        whole_from = skew == 0 ? 0 : 1;
        whole_to = end == VECTOR ? vectors : vectors - 1;
    }

    // The index of the first entry of a vector.
    DEVICE int64 index(int vector) const { return static_cast<int64>(vector) * VECTOR - skew; }

    // A vector; -inf throughout beyond the last one.
    DEVICE PairOfVectors load(int vector) const
    {
        PairOfVectors pair;
        if (ALIGNED && vector >= whole_from && vector < whole_to) {
            pair.p.template load<false>(at_x(vector));
            pair.q.template load<false>(at_y(vector));
        } else {
            pair = load_some(vector);
        }
        return pair;
    }

    // The same, to a place in shared memory and on its own, as part of a batch to be waited for.
    DEVICE void copy(int vector, const Room& room, int place) const
    {
        if (ALIGNED && vector >= whole_from && vector < whole_to) {
            room.p[place].copy(at_x(vector));
            room.q[place].copy(at_y(vector));
        } else {
            const PairOfVectors pair = load_some(vector);
            room.p[place] = pair.p;
            room.q[place] = pair.q;
        }
    }

    DEVICE const char* at_x(int vector) const
    {
        return x + static_cast<int64>(vector) * (VECTOR * Entry<DTYPE_P>::size);
    }
    DEVICE const char* at_y(int vector) const
    {
        return y + static_cast<int64>(vector) * (VECTOR * Entry<DTYPE_Q>::size);
    }
    // Which entries of a vector there are.
    DEVICE PairOfVectors load_some(int vector) const
    {
        const int from = vector == 0 ? skew : 0;
        const int to = vector < vectors - 1 ? VECTOR : vector < vectors ? end : 0;
        return load_entries(at_x(vector), at_y(vector), from, to);
    }

    // Whether the rows differ anywhere, as numbers; all threads of the team ask.
    DEVICE bool differ() const
    {
        bool found = false;
        for (int vector = team_rank(); vector < vectors; vector += TEAM) {
            float p[VECTOR], q[VECTOR];
            load(vector).unpack(p, q);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i)
                found = found || p[i] != q[i];
        }
        return team_any(found);
    }
};
