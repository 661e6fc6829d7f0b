// The table of operations by their names. What PTX leaves open (approximations, NaN's bits) is as a card may have it,
// not as each has it.
#include "operations.h"

#include <unordered_map>

#include "lanes.h"
#include "numbers.h"

namespace {

typedef std::unordered_map<std::string, Operation> Table;

template <const auto &f, class D, class... A, size_t... i>
inline void apply(Warp &warp, const Instruction &in, u32 mask, std::index_sequence<i...>) {
    each_lane(mask, [&](int lane) {
        put<D>(warp, in.at[0], lane, static_cast<D>(f(get<A>(warp, in.at[1 + i], lane)...)));
    });
}

// A function of types A that gives D.
template <const auto &f, class D, class... A>
Operation each() {
    return {{STRIDE<D>, STRIDE<A>...}, [](Warp &warp, const Instruction &in, u32 mask) {
                apply<f, D, A...>(warp, in, mask, std::index_sequence_for<A...>());
            }};
}

template <const auto &f, class T>
Operation compare() {
    return {{0, STRIDE<T>, STRIDE<T>}, [](Warp &warp, const Instruction &in, u32 mask) {
                u32 found = 0;
                for (int lane = 0; lane < LANES; lane++) {
                    const bool yes = f(get<T>(warp, in.at[1], lane), get<T>(warp, in.at[2], lane));
                    found |= static_cast<u32>(yes) << lane;
                }
                set_bits(warp, in.at[0], mask, found);
            }};
}

template <class T>
Operation select() {
    return {{STRIDE<T>, STRIDE<T>, STRIDE<T>, 0}, [](Warp &warp, const Instruction &in, u32 mask) {
                const u32 first = bits(warp, in.at[3]);
                each_lane(mask, [&](int lane) {
                    put<T>(warp, in.at[0], lane, get<T>(warp, in.at[first >> lane & 1 ? 1 : 2], lane));
                });
            }};
}

template <const auto &f>
Operation of_predicate() {
    return {{0, 0}, [](Warp &warp, const Instruction &in, u32 mask) {
                set_bits(warp, in.at[0], mask, f(bits(warp, in.at[1])));
            }};
}

template <const auto &f>
Operation of_predicates() {
    return {{0, 0, 0}, [](Warp &warp, const Instruction &in, u32 mask) {
                set_bits(warp, in.at[0], mask, f(bits(warp, in.at[1]), bits(warp, in.at[2])));
            }};
}

// ------------------------------------------------------------------------------------------- of any kind of number

constexpr auto same = [](auto a) { return a; };
constexpr auto minus = [](auto a) { return -a; };
constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto less = [](auto a, auto b) { return a - b; };
constexpr auto times = [](auto a, auto b) { return a * b; };

constexpr auto equal = [](auto a, auto b) { return a == b; };
constexpr auto below = [](auto a, auto b) { return a < b; };
constexpr auto at_most = [](auto a, auto b) { return a <= b; };
constexpr auto above = [](auto a, auto b) { return a > b; };
constexpr auto at_least = [](auto a, auto b) { return a >= b; };

// U: T's bits. `unequal` is given, since a float that is NaN is neither equal nor unequal.
template <class T, class U, const auto &unequal>
void comparisons(Table &t, const std::string &type) {
    t["selp." + type] = select<U>();
    t["setp.eq." + type] = compare<equal, T>();
    t["setp.ne." + type] = compare<unequal, T>();
    t["setp.lt." + type] = compare<below, T>();
    t["setp.le." + type] = compare<at_most, T>();
    t["setp.gt." + type] = compare<above, T>();
    t["setp.ge." + type] = compare<at_least, T>();
}

// -------------------------------------------------------------------------------------------------------- integers

constexpr auto differ = [](auto a, auto b) { return a != b; };
constexpr auto bit_and = [](auto a, auto b) { return a & b; };
constexpr auto bit_or = [](auto a, auto b) { return a | b; };
constexpr auto bit_xor = [](auto a, auto b) { return a ^ b; };
constexpr auto bit_not = [](auto a) { return ~a; };
constexpr auto product = [](u64 a, u64 b) { return a * b; };
constexpr auto product_and_sum = [](u64 a, u64 b, u64 c) { return a * b + c; };
constexpr auto lower = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto higher = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto size_of = [](auto a) { return a < 0 ? 0 - a : a; };
constexpr auto quotient = [](auto a, auto b) { return b == 0 ? static_cast<decltype(a)>(-1) : a / b; };
constexpr auto rest = [](auto a, auto b) { return b == 0 ? a : a % b; };
constexpr auto left = [](auto a, u32 by) { return shift_left(a, by); };
constexpr auto right = [](auto a, u32 by) { return shift_right(a, by); };

// T is signed where the type is; U has no sign, so that it may overflow.
template <class T, class U>
void integers(Table &t, const std::string &type) {
    t["mov." + type] = each<same, U, U>();
    t["add." + type] = each<plus, U, U, U>();
    t["sub." + type] = each<less, U, U, U>();
    t["mul.lo." + type] = each<product, U, U, U>();
    t["mad.lo." + type] = each<product_and_sum, U, U, U, U>();
    t["neg." + type] = each<minus, U, U>();
    t["abs." + type] = each<size_of, T, T>();
    t["and." + type] = each<bit_and, U, U, U>();
    t["or." + type] = each<bit_or, U, U, U>();
    t["xor." + type] = each<bit_xor, U, U, U>();
    t["not." + type] = each<bit_not, U, U>();
    t["min." + type] = each<lower, T, T, T>();
    t["max." + type] = each<higher, T, T, T>();
    t["div." + type] = each<quotient, T, T, T>();
    t["rem." + type] = each<rest, T, T, T>();
    t["shl." + type] = each<left, U, U, u32>();
    t["shr." + type] = each<right, T, T, u32>();
    comparisons<T, U, differ>(t, type);
}

constexpr auto wide_product = [](s64 a, s64 b) { return a * b; };
constexpr auto wide_product_and_sum = [](s64 a, s64 b, u64 c) { return static_cast<u64>(a * b) + c; };
constexpr auto high_half = [](auto a, auto b) { return static_cast<s64>(a) * b >> 32; };
constexpr auto high_half_u32 = [](u64 a, u64 b) { return a * b >> 32; };
constexpr auto high_half_u64 = [](u64 a, u64 b) { return static_cast<unsigned __int128>(a) * b >> 64; };
constexpr auto high_half_s64 = [](s64 a, s64 b) { return static_cast<__int128>(a) * b >> 64; };

void products(Table &t) {
    t["mul.wide.s16"] = each<wide_product, s32, s16, s16>();
    t["mul.wide.u16"] = each<wide_product, u32, u16, u16>();
    t["mul.wide.s32"] = each<wide_product, s64, s32, s32>();
    t["mul.wide.u32"] = each<product, u64, u32, u32>();
    t["mad.wide.s32"] = each<wide_product_and_sum, u64, s32, s32, u64>();
    t["mad.wide.u32"] = each<product_and_sum, u64, u32, u32, u64>();
    t["mul.hi.s32"] = each<high_half, s32, s32, s32>();
    t["mul.hi.u32"] = each<high_half_u32, u32, u32, u32>();
    t["mul.hi.s64"] = each<high_half_s64, s64, s64, s64>();
    t["mul.hi.u64"] = each<high_half_u64, u64, u64, u64>();
}

constexpr auto count_ones = [](u64 a) { return __builtin_popcountll(a); };
constexpr auto leading_zeros = [](u32 a) { return a != 0 ? __builtin_clz(a) : 32; };
constexpr auto to_the_top = [](u32 a) { return a != 0 ? __builtin_clz(a) : -1; };
constexpr auto mirrored = [](u32 a) { return reversed(a); };
constexpr auto by_table = [](u32 a, u32 b, u32 c, u32 table) { return lop3(a, b, c, table); };
constexpr auto permuted = [](u32 a, u32 b, u32 c) { return permute(a, b, c); };
constexpr auto inserted = [](auto a, auto b, u32 from, u32 length) { return insert_bits(a, b, from, length); };
constexpr auto funnel_left = [](u32 a, u32 b, u32 by) { return ((u64(b) << 32 | a) << (by & 31)) >> 32; };
constexpr auto funnel_right = [](u32 a, u32 b, u32 by) { return (u64(b) << 32 | a) >> (by & 31); };

void bit_operations(Table &t) {
    t["popc.b32"] = each<count_ones, u32, u32>();
    t["popc.b64"] = each<count_ones, u32, u64>();
    t["clz.b32"] = each<leading_zeros, u32, u32>();
    t["bfind.shiftamt.u32"] = each<to_the_top, u32, u32>();
    t["brev.b32"] = each<mirrored, u32, u32>();
    t["lop3.b32"] = each<by_table, u32, u32, u32, u32, u32>();
    t["prmt.b32"] = each<permuted, u32, u32, u32, u32>();
    t["bfi.b32"] = each<inserted, u32, u32, u32, u32, u32>();
    t["bfi.b64"] = each<inserted, u64, u64, u64, u32, u32>();
    t["shf.l.wrap.b32"] = each<funnel_left, u32, u32, u32, u32>();
    t["shf.r.wrap.b32"] = each<funnel_right, u32, u32, u32, u32>();
    t["and.pred"] = of_predicates<bit_and>();
    t["or.pred"] = of_predicates<bit_or>();
    t["xor.pred"] = of_predicates<bit_xor>();
    t["not.pred"] = of_predicate<bit_not>();
    t["mov.pred"] = of_predicate<same>();
}

// -------------------------------------------------------------------------------------------------- floating point

constexpr auto fused = [](auto a, auto b, auto c) { return fma(a, b, c); };
constexpr auto over = [](auto a, auto b) { return a / b; };
constexpr auto inverse = [](auto a) { return 1 / a; };
constexpr auto root = [](auto a) { return sqrt(a); };
constexpr auto magnitude = [](auto a) { return fabs(a); };

// Without a `u` in its name a comparison is false where one is NaN, with it true.
constexpr auto apart = [](auto a, auto b) { return a < b || a > b; };
constexpr auto not_apart = [](auto a, auto b) { return !(a < b || a > b); };
constexpr auto not_equal = [](auto a, auto b) { return !(a == b); };
constexpr auto not_at_least = [](auto a, auto b) { return !(a >= b); };
constexpr auto not_above = [](auto a, auto b) { return !(a > b); };
constexpr auto not_at_most = [](auto a, auto b) { return !(a <= b); };
constexpr auto not_below = [](auto a, auto b) { return !(a < b); };
constexpr auto any_nan = [](auto a, auto b) { return a != a || b != b; };
constexpr auto no_nan = [](auto a, auto b) { return a == a && b == b; };

// U: its bits.
template <class T, class U>
void floats(Table &t, const std::string &type) {
    t["mov." + type] = each<same, U, U>();
    for (const std::string rounding : {"", ".rn"}) {
        t["add" + rounding + "." + type] = each<plus, T, T, T>();
        t["sub" + rounding + "." + type] = each<less, T, T, T>();
        t["mul" + rounding + "." + type] = each<times, T, T, T>();
    }
    t["fma.rn." + type] = each<fused, T, T, T, T>();
    t["div.rn." + type] = each<over, T, T, T>();
    t["rcp.rn." + type] = each<inverse, T, T>();
    t["sqrt.rn." + type] = each<root, T, T>();
    t["neg." + type] = each<minus, T, T>();
    t["abs." + type] = each<magnitude, T, T>();
    comparisons<T, U, apart>(t, type);
    t["setp.equ." + type] = compare<not_apart, T>();
    t["setp.neu." + type] = compare<not_equal, T>();
    t["setp.ltu." + type] = compare<not_at_least, T>();
    t["setp.leu." + type] = compare<not_above, T>();
    t["setp.gtu." + type] = compare<not_at_most, T>();
    t["setp.geu." + type] = compare<not_below, T>();
    t["setp.nan." + type] = compare<any_nan, T>();
    t["setp.num." + type] = compare<no_nan, T>();
}

constexpr auto least_f32 = [](f32 a, f32 b) { return least(a, b); };
constexpr auto largest_f32 = [](f32 a, f32 b) { return largest(a, b); };
constexpr auto least_f64 = [](f64 a, f64 b) { return fmin(a, b); };
constexpr auto largest_f64 = [](f64 a, f64 b) { return fmax(a, b); };
constexpr auto fused_down = [](f32 a, f32 b, f32 c) { return fma_down(a, b, c); };
constexpr auto sum_to_zero = [](f32 a, f32 b) { return add_to_zero(a, b); };
constexpr auto fused_bf16x2 = [](u32 a, u32 b, u32 c) { return fma_bf16x2(a, b, c); };
constexpr auto signs_of_two = [](u32 a) { return a ^ 0x80008000; };

// Functions of which a card has approximations.
constexpr auto power = [](f32 a) { return exp2f(a); };
constexpr auto flushed_power = [](f32 a) { return flush(exp2f(flush(a))); };
constexpr auto flushed_inverse = [](auto a) { return flush(1 / flush(a)); };
constexpr auto inverse_root = [](f32 a) { return 1 / sqrt(static_cast<f64>(a)); };

// Half floats that are two to a register; NaN where one is.
template <bool SMALLER>
u32 chosen_of_two(u32 a, u32 b) {
    u32 r = 0;
    for (int shift : {0, 16}) {
        const f32 x = from_f16(a >> shift), y = from_f16(b >> shift);
        const u32 one = any_nan(x, y) ? 0x7fff : to_f16(SMALLER ? least(x, y) : largest(x, y));
        r |= one << shift;
    }
    return r;
}
constexpr auto least_f16x2 = [](u32 a, u32 b) { return chosen_of_two<true>(a, b); };
constexpr auto largest_f16x2 = [](u32 a, u32 b) { return chosen_of_two<false>(a, b); };

void functions(Table &t) {
    t["min.f32"] = each<least_f32, f32, f32, f32>();
    t["max.f32"] = each<largest_f32, f32, f32, f32>();
    t["min.f64"] = each<least_f64, f64, f64, f64>();
    t["max.f64"] = each<largest_f64, f64, f64, f64>();
    t["fma.rm.f32"] = each<fused_down, f32, f32, f32, f32>();
    t["add.rz.f32"] = each<sum_to_zero, f32, f32, f32>();
    t["fma.rn.bf16x2"] = each<fused_bf16x2, u32, u32, u32, u32>();
    t["neg.bf16x2"] = each<signs_of_two, u32, u32>();
    t["neg.f16x2"] = each<signs_of_two, u32, u32>();
    t["min.NaN.f16x2"] = each<least_f16x2, u32, u32, u32>();
    t["max.NaN.f16x2"] = each<largest_f16x2, u32, u32, u32>();
    t["ex2.approx.f32"] = each<power, f32, f32>();
    t["ex2.approx.ftz.f32"] = each<flushed_power, f32, f32>();
    t["rcp.approx.ftz.f32"] = each<flushed_inverse, f32, f32>();
    t["rcp.approx.ftz.f64"] = each<inverse, f64, f64>();
    t["rsqrt.approx.f32"] = each<inverse_root, f32, f32>();
}

// ----------------------------------------------------------------------------------------------------- conversions

template <class D>
constexpr auto truncated = [](f64 a) { return to_int<D>(a, false); };
template <class D>
constexpr auto nearest = [](f64 a) { return to_int<D>(a, true); };

// D is as wide as a register where the type is narrower: it fills that as its type says.
template <class T, class D, class A>
constexpr auto narrowed = [](A a) { return static_cast<D>(static_cast<T>(a)); };

template <class T, class D>
void to_integer(Table &t, const std::string &type) {
    const std::string name = "cvt." + type + ".";
    t[name + "s8"] = each<narrowed<T, D, s8>, D, s8>();
    t[name + "u8"] = each<narrowed<T, D, u8>, D, u8>();
    t[name + "s16"] = each<narrowed<T, D, s16>, D, s16>();
    t[name + "u16"] = each<narrowed<T, D, u16>, D, u16>();
    t[name + "s32"] = each<narrowed<T, D, s32>, D, s32>();
    t[name + "u32"] = each<narrowed<T, D, u32>, D, u32>();
    t[name + "s64"] = each<narrowed<T, D, s64>, D, s64>();
    t[name + "u64"] = each<narrowed<T, D, u64>, D, u64>();
}

template <class T>
void between_integers_and_floats(Table &t, const std::string &type) {
    t["cvt.rzi." + type + ".f32"] = each<truncated<T>, T, f32>();
    t["cvt.rzi." + type + ".f64"] = each<truncated<T>, T, f64>();
    t["cvt.rni." + type + ".f32"] = each<nearest<T>, T, f32>();
    t["cvt.rni." + type + ".f64"] = each<nearest<T>, T, f64>();
    t["cvt.rn.f32." + type] = each<same, f32, T>();
    t["cvt.rn.f64." + type] = each<same, f64, T>();
}

constexpr auto saturated = [](f32 a) { return a > 0 ? a < 1 ? a : 1 : 0; };  // NaN gives 0
constexpr auto rounded = [](auto a) { return nearbyint(a); };
constexpr auto rounded_up = [](auto a) { return ceil(a); };
constexpr auto rounded_down = [](auto a) { return floor(a); };
constexpr auto rounded_to_zero = [](auto a) { return trunc(a); };
constexpr auto as_bf16 = [](f32 a) { return to_bf16(a); };
constexpr auto as_f16 = [](f32 a) { return to_f16(a); };
constexpr auto of_f16 = [](u16 a) { return from_f16(a); };
constexpr auto two_bf16 = [](f32 high, f32 low) { return static_cast<u32>(to_bf16(high)) << 16 | to_bf16(low); };
constexpr auto two_f16 = [](f32 high, f32 low) { return static_cast<u32>(to_f16(high)) << 16 | to_f16(low); };

void conversions(Table &t) {
    to_integer<s8, s32>(t, "s8");
    to_integer<u8, u32>(t, "u8");
    to_integer<s16, s32>(t, "s16");
    to_integer<u16, u32>(t, "u16");
    to_integer<s32, s32>(t, "s32");
    to_integer<u32, u32>(t, "u32");
    to_integer<s64, s64>(t, "s64");
    to_integer<u64, u64>(t, "u64");
    between_integers_and_floats<s32>(t, "s32");
    between_integers_and_floats<u32>(t, "u32");
    between_integers_and_floats<s64>(t, "s64");
    between_integers_and_floats<u64>(t, "u64");
    t["cvt.rn.f32.u16"] = each<same, f32, u16>();
    t["cvt.rn.f32.s16"] = each<same, f32, s16>();
    t["cvt.rn.f32.u8"] = each<same, f32, u8>();
    t["cvt.rn.f32.s8"] = each<same, f32, s8>();
    t["cvt.f64.f32"] = each<same, f64, f32>();
    t["cvt.rn.f32.f64"] = each<same, f32, f64>();
    t["cvt.sat.f32.f32"] = each<saturated, f32, f32>();
    t["cvt.rni.f32.f32"] = each<rounded, f32, f32>();
    t["cvt.rpi.f32.f32"] = each<rounded_up, f32, f32>();
    t["cvt.rmi.f32.f32"] = each<rounded_down, f32, f32>();
    t["cvt.rzi.f32.f32"] = each<rounded_to_zero, f32, f32>();
    t["cvt.rpi.f64.f64"] = each<rounded_up, f64, f64>();
    t["cvt.rmi.f64.f64"] = each<rounded_down, f64, f64>();
    t["cvt.rn.bf16.f32"] = each<as_bf16, u16, f32>();
    t["cvt.rn.f16.f32"] = each<as_f16, u16, f32>();
    t["cvt.f32.f16"] = each<of_f16, f32, u16>();
    t["cvt.rn.bf16x2.f32"] = each<two_bf16, u32, f32, f32>();
    t["cvt.rn.f16x2.f32"] = each<two_f16, u32, f32, f32>();
}

Table make_table() {
    Table t;
    integers<s16, u16>(t, "s16");
    integers<u16, u16>(t, "u16");
    integers<u16, u16>(t, "b16");
    integers<s32, u32>(t, "s32");
    integers<u32, u32>(t, "u32");
    integers<u32, u32>(t, "b32");
    integers<s64, u64>(t, "s64");
    integers<u64, u64>(t, "u64");
    integers<u64, u64>(t, "b64");
    products(t);
    bit_operations(t);
    floats<f32, u32>(t, "f32");
    floats<f64, u64>(t, "f64");
    functions(t);
    conversions(t);
    return t;
}

}  // namespace

const Operation *find_operation(const std::string &opcode) {
    static const Table &table = *new Table(make_table());
    const auto found = table.find(opcode);
    return found == table.end() ? nullptr : &found->second;
}
