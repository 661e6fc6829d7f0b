// Operands of lanes.
#pragma once
#include <string.h>

#include "machine.h"

// Types below 4 bytes have a place of 4.
template <class T>
constexpr int STRIDE = sizeof(T) == 8 ? 8 : 4;

template <class T>
inline T get(const Warp &warp, int at, int lane) {
    T v;
    memcpy(&v, warp.arena + at + lane * STRIDE<T>, sizeof(T));
    return v;
}

template <class T>
inline void put(Warp &warp, int at, int lane, T v) {
    memcpy(warp.arena + at + lane * STRIDE<T>, &v, sizeof(T));
}

// A predicate of all lanes.
inline u32 bits(const Warp &warp, int at) {
    u32 v;
    memcpy(&v, warp.arena + at, 4);
    return v;
}

inline void set_bits(Warp &warp, int at, u32 mask, u32 v) {
    v = (bits(warp, at) & ~mask) | (v & mask);
    memcpy(warp.arena + at, &v, 4);
}

// Does `f(lane)` for the lanes of a mask.
template <class F>
inline void each_lane(u32 mask, F f) {
    if (mask == ALL_LANES) {
        for (int lane = 0; lane < LANES; lane++) f(lane);
        return;
    }
    for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

inline int first_lane(u32 mask) { return __builtin_ctz(mask); }
