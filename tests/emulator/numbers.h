// Numbers as PTX rounds, picks and shuffles them.
#pragma once
#include <math.h>
#include <string.h>

#include <limits>

#include "machine.h"

template <class To, class From>
inline To as(From v) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    memcpy(&to, &v, sizeof(To));
    return to;
}

inline f32 from_bf16(u32 v) { return as<f32>(v << 16); }
inline u16 to_bf16(f32 v) {
    const u32 b = as<u32>(v);
    return v != v ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

// To f32 with a last bit that says whether anything was left: rounding that to fewer bits is right.
inline f32 to_odd(f64 v) {
    f32 f = static_cast<f32>(v);
    if (f == v || v != v || isinf(f)) return f;
    if (fabs(static_cast<f64>(f)) > fabs(v)) f = nextafterf(f, 0);
    return as<f32>(as<u32>(f) | 1);
}

inline f32 from_f16(u16 v) {
    const int exponent = v >> 10 & 31, fraction = v & 1023;
    f32 size = exponent == 0 ? ldexpf(fraction, -24) : ldexpf(1024 + fraction, exponent - 25);
    if (exponent == 31) size = fraction != 0 ? NAN : INFINITY;
    return v >> 15 ? -size : size;
}
inline u16 to_f16(f32 v) {
    if (v != v) return 0x7fff;
    const u16 sign = signbit(v) ? 0x8000 : 0;
    const f32 size = fabsf(v);
    if (size >= 65520) return sign | 0x7c00;
    int exponent = 0;
    frexpf(size, &exponent);
    exponent = exponent < -13 ? -13 : exponent;  // subnormal ones share theirs
    // In units of the last bit: 1024 to 2048 of them, less for a subnormal number. A carry moves on to the exponent.
    const int units = static_cast<int>(nearbyintf(ldexpf(size, 11 - exponent)));
    return size == 0 ? sign : sign | (((exponent + 13) << 10) + units);
}

// What is too small for f32's usual form is zero.
inline f32 flush(f32 v) { return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v; }

template <class I>
inline I to_int(f64 v, bool nearest) {
    typedef std::numeric_limits<I> Limits;
    if (v != v) return 0;
    v = nearest ? nearbyint(v) : trunc(v);
    if (v <= static_cast<f64>(Limits::min())) return Limits::min();
    if (v >= static_cast<f64>(Limits::max())) return Limits::max();
    return static_cast<I>(v);
}

// Of two, the one that is a number; of zeros, the one with the right sign.
inline f32 least(f32 a, f32 b) {
    if (a != a || b != b) return a != a ? b : a;
    return a < b || (a == b && signbit(a)) ? a : b;
}
inline f32 largest(f32 a, f32 b) {
    if (a != a || b != b) return a != a ? b : a;
    return a > b || (a == b && !signbit(a)) ? a : b;
}

// Rounded down, and to zero. In f64 a product of two f32 is exact; a sum of it and a third may not be, so what it
// misses is looked at too.
inline f64 missed_by_sum(f64 a, f64 b, f64 sum) {
    const f64 other = sum - a;
    return (a - (sum - other)) + (b - other);
}
inline f32 fma_down(f32 a, f32 b, f32 c) {
    const f64 product = static_cast<f64>(a) * b, sum = product + c, missed = missed_by_sum(product, c, sum);
    const f32 f = static_cast<f32>(sum);
    return f > sum || (f == sum && missed < 0) ? nextafterf(f, -INFINITY) : f;
}
inline f32 add_to_zero(f32 a, f32 b) {
    const f64 sum = static_cast<f64>(a) + b, missed = missed_by_sum(a, b, sum);
    const f32 f = static_cast<f32>(sum);
    const bool beyond = fabs(static_cast<f64>(f)) > fabs(sum) || (f == sum && missed * sum < 0);
    return beyond ? nextafterf(f, 0) : f;
}

inline u16 fma_bf16(u32 a, u32 b, u32 c) {
    return to_bf16(to_odd(static_cast<f64>(from_bf16(a)) * from_bf16(b) + from_bf16(c)));
}
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    const u32 high = fma_bf16(a >> 16, b >> 16, c >> 16);
    return high << 16 | fma_bf16(a & 0xffff, b & 0xffff, c & 0xffff);
}

// Bit by bit a function of three, told by its table.
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int i = 0; i < 8; i++) {
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return r;
}

// Four bytes of the eight of a and b; or copies of a byte's sign.
inline u32 permute(u32 a, u32 b, u32 choice) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        const u32 which = choice >> 4 * i & 15;
        u8 byte = bytes >> 8 * (which & 7);
        if (which & 8) byte = byte & 0x80 ? 0xff : 0;
        r |= static_cast<u32>(byte) << 8 * i;
    }
    return r;
}

inline u32 reversed(u32 v) {
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}

// Shifts by more than there are bits are shifts by all.
template <class T>
inline T shift_left(T v, u32 by) {
    return by >= sizeof(T) * 8 ? 0 : v << by;
}
template <class T>
inline T shift_right(T v, u32 by) {
    return by >= sizeof(T) * 8 ? (v < 0 ? -1 : 0) : v >> by;
}

// The lowest `length` bits of `a` put into `b` from bit `from` on.
template <class T>
inline T insert_bits(T a, T b, u32 from, u32 length) {
    from &= 255, length &= 255;
    if (from >= sizeof(T) * 8) return b;
    const T ones = length >= sizeof(T) * 8 ? ~T(0) : (T(1) << length) - 1;
    return (b & ~(ones << from)) | ((a << from) & (ones << from));
}
