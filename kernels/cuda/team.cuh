// Threads that share a row, or a part of one, and what they know together.
//
// A team is a warp, so that a block holds THREADS/32 of them and as many short rows, or the whole
// block. Sums are taken over a fixed tree: the same bits in every thread, and in every run.

#pragma once

#ifndef THREADS
#define THREADS 256
#endif
#ifndef TEAM
#define TEAM THREADS
#endif
static_assert(TEAM == 32 || TEAM == THREADS, "a team is a warp or a block");

constexpr int WARPS = TEAM / 32;

DEVICE int team_rank() { return thread_index() % TEAM; }
DEVICE int team_in_block() { return thread_index() / TEAM; }
constexpr int TEAMS = THREADS / TEAM;

DEVICE void team_barrier()
{
    if constexpr (TEAM == 32)
        warp_barrier();
    else
        block_barrier();
}

// Shared memory begins with the team's own; the rest is the kernel's.
constexpr int SCRATCH = TEAM == 32 ? 0 : 64 * WARPS;

DEVICE Bytes16* kernel_shared() { return dynamic_shared() + SCRATCH / 16; }

struct Add {
    template <class T>
    static DEVICE T join(T a, T b)
    {
        return a + b;
    }
};
struct Larger {
    template <class T>
    static DEVICE T join(T a, T b)
    {
        return larger(a, b);
    }
};

// Join the COUNT numbers of every thread of the team; all get the results.
template <class JOIN, class T, int COUNT>
DEVICE void team_join(T (&values)[COUNT])
{
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            values[i] = JOIN::join(values[i], shuffle_xor(values[i], mask));
    }
    if constexpr (TEAM != 32) {
        static_assert(sizeof(T) * COUNT <= SCRATCH / WARPS, "more than a warp's share of scratch");
        T* shared = reinterpret_cast<T*>(dynamic_shared());
        if (thread_index() % 32 == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                shared[thread_index() / 32 * COUNT + i] = values[i];
        }
        block_barrier();
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            T value = shared[i];
            for (int warp = 1; warp < WARPS; ++warp)
                value = JOIN::join(value, shared[warp * COUNT + i]);
            values[i] = value;
        }
        block_barrier();  // before anyone writes there again
    }
}

template <class T, int COUNT>
DEVICE void team_add(T (&values)[COUNT])
{
    team_join<Add>(values);
}

template <class T>
DEVICE T team_add(T value)
{
    T values[1] = {value};
    team_join<Add>(values);
    return values[0];
}

template <class T>
DEVICE T team_larger(T value)
{
    T values[1] = {value};
    team_join<Larger>(values);
    return values[0];
}

DEVICE bool team_any(bool condition) { return team_larger(condition ? 1.0f : 0.0f) > 0.0f; }

// The largest entry that any thread found, and the smallest index where it stands; -1 if none.
struct Top {
    float value;
    int64 index;
};

DEVICE Top better(Top a, Top b)
{
    const bool other = b.value > a.value || (b.value == a.value && b.index < a.index);
    return other ? b : a;
}

DEVICE Top team_top(Top top)
{
#pragma unroll
    for (int mask = 16; mask; mask /= 2)
        top = better(top, {shuffle_xor(top.value, mask), shuffle_xor(top.index, mask)});
    if constexpr (TEAM != 32) {
        Top* shared = reinterpret_cast<Top*>(dynamic_shared());
        if (thread_index() % 32 == 0)
            shared[thread_index() / 32] = top;
        block_barrier();
        top = shared[0];
        for (int warp = 1; warp < WARPS; ++warp)
            top = better(top, shared[warp]);
        block_barrier();
    }
    return top;
}

// Whether this team finishes the last one of a row's parts. It then sees what the first threads of
// the other teams wrote before they asked.
DEVICE bool is_last_part(const Call& call, int64 row)
{
    float before = 0.0f;
    if (team_rank() == 0) {
        memory_fence();
        before = static_cast<float>(atomic_add(call.arrived + row, 1));
    }
    const bool last = team_larger(before) + 1.0f >= static_cast<float>(call.parts);
    memory_fence();
    return last;
}
