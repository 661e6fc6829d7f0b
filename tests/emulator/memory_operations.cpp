// Loads, stores, atomic operations, registers in pieces, and addresses of one space in another.
#include "assembler.h"
#include "lanes.h"
#include "memory.h"

namespace {

// Whole in one access, as other ranks' kernels see it.
template <class T>
T read(const u8 *from) {
    T v;
    __atomic_load(reinterpret_cast<const T *>(from), &v, __ATOMIC_ACQUIRE);
    return v;
}
template <class T>
void write(u8 *to, T v) {
    __atomic_store(reinterpret_cast<T *>(to), &v, __ATOMIC_RELEASE);
}

// T in memory, R in registers, which are at[0] and on.
template <class T, class R>
void load(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        const u8 *from = resolve(warp, in, in.address, sizeof(T) * in.count, lane);
        for (int i = 0; i < in.count; i++) {
            const R v = static_cast<R>(read<T>(from + sizeof(T) * i));
            if (in.at[i] != NONE) put<R>(warp, in.at[i], lane, v);
        }
    });
}

template <class T, class R>
void store(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        u8 *to = resolve(warp, in, in.address, sizeof(T) * in.count, lane);
        for (int i = 0; i < in.count; i++) write<T>(to + sizeof(T) * i, static_cast<T>(get<R>(warp, in.at[i], lane)));
    });
}

template <class T>
Run load_to(bool wide) {
    typedef std::conditional_t<std::is_signed_v<T>, s32, u32> Narrow;
    typedef std::conditional_t<std::is_signed_v<T>, s64, u64> Wide;
    if constexpr (sizeof(T) == 8) return load<T, T>;
    return wide ? load<T, Wide> : load<T, Narrow>;
}

template <class T>
Run store_from(bool wide) {
    if constexpr (sizeof(T) == 8) return store<T, T>;
    return wide ? store<T, u64> : store<T, u32>;
}

Run find_load(size_t size, bool is_signed, bool wide) {
    switch (size) {
        case 1: return is_signed ? load_to<s8>(wide) : load_to<u8>(wide);
        case 2: return is_signed ? load_to<s16>(wide) : load_to<u16>(wide);
        case 4: return is_signed ? load_to<s32>(wide) : load_to<u32>(wide);
        default: return load_to<u64>(wide);
    }
}

Run find_store(size_t size, bool wide) {
    switch (size) {
        case 1: return store_from<u8>(wide);
        case 2: return store_from<u16>(wide);
        case 4: return store_from<u32>(wide);
        default: return store_from<u64>(wide);
    }
}

Space space_of(const Statement &s) {
    if (s.has("global")) return GLOBAL;
    if (s.has("shared")) return SHARED;
    if (s.has("local")) return LOCAL;
    // What functions are given and give back is local.
    return s.has("param") ? PARAMETERS : GENERIC;
}

void load_or_store(Assembler &assembler, const Statement &s, Instruction &in) {
    const bool is_load = s.parts[0] == "ld";
    const std::vector<std::string> registers = elements(s.operands[is_load ? 0 : 1]);
    const size_t size = type_size(s.type());
    bool wide = size == 8;
    for (const std::string &name : registers) {
        in.at[in.count++] = name == "_" ? NONE : assembler.operand_of_any_size(name, size == 8 ? 8 : 4);
        wide |= assembler.size_of(name) == 8;
    }
    in.address = assembler.address(s.operands[is_load ? 1 : 0], space_of(s));
    in.run = is_load ? find_load(size, s.type()[0] == 's', wide) : find_store(size, wide);
}

// ------------------------------------------------------------------------------------------------ atomic operations

// at: what was there (or NONE), the operand, and the new value of a compare-and-swap.
template <class T, const auto &f>
void update(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        T *p = reinterpret_cast<T *>(resolve(warp, in, in.address, sizeof(T), lane));
        const T given = get<T>(warp, in.at[1], lane), other = in.at[2] != NONE ? get<T>(warp, in.at[2], lane) : T();
        T was, now;
        __atomic_load(p, &was, __ATOMIC_SEQ_CST);
        do {
            now = f(was, given, other);
        } while (!__atomic_compare_exchange(p, &was, &now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        if (in.at[0] != NONE) put<T>(warp, in.at[0], lane, was);
    });
}

constexpr auto add = [](auto was, auto given, auto) { return was + given; };
constexpr auto min = [](auto was, auto given, auto) { return was < given ? was : given; };
constexpr auto max = [](auto was, auto given, auto) { return was > given ? was : given; };
constexpr auto either = [](auto was, auto given, auto) { return was | given; };
constexpr auto both = [](auto was, auto given, auto) { return was & given; };
constexpr auto exchange = [](auto, auto given, auto) { return given; };
constexpr auto swap_if_equal = [](auto was, auto given, auto other) { return was == given ? other : was; };

// T is signed where the type is, U is not.
template <class T, class U>
Run find_update(const Statement &s) {
    if (s.has("add")) return update<U, add>;
    if (s.has("min")) return update<T, min>;
    if (s.has("max")) return update<T, max>;
    if (s.has("or")) return update<U, either>;
    if (s.has("and")) return update<U, both>;
    if (s.has("exch")) return update<U, exchange>;
    return s.has("cas") ? update<U, swap_if_equal> : nullptr;
}

Run find_update(const Statement &s) {
    const std::string &type = s.type();
    if (type == "f32") return s.has("add") ? update<f32, add> : nullptr;
    if (type == "s32") return find_update<s32, u32>(s);
    if (type == "s64") return find_update<s64, u64>(s);
    if (type == "u64" || type == "b64") return find_update<u64, u64>(s);
    return type == "u32" || type == "b32" ? find_update<u32, u32>(s) : nullptr;
}

void atomic(Assembler &assembler, const Statement &s, Instruction &in) {
    const size_t size = type_size(s.type()), first = s.parts[0] == "atom" ? 1 : 0;
    if (first == 1 && s.operands[0] != "_") in.at[0] = assembler.operand(s.operands[0], size);
    in.address = assembler.address(s.operands[first], space_of(s));
    for (size_t i = first + 1; i < s.operands.size(); i++) in.at[i - first] = assembler.operand(s.operands[i], size);
    in.run = find_update(s);
}

// --------------------------------------------------------------------------------------------- registers in pieces

// mode: bytes of a piece. The whole is at[8].
template <class T>
void take_apart(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        const T whole = get<T>(warp, in.at[8], lane);
        for (int i = 0; i < in.count; i++) {
            const u64 piece = whole >> 8 * in.mode * i, kept = (u64(1) << 8 * in.mode) - 1;
            if (in.at[i] != NONE) put<u32>(warp, in.at[i], lane, piece & kept);
        }
    });
}

template <class T>
void put_together(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        T whole = 0;
        for (int i = 0; i < in.count; i++) {
            const u64 kept = (u64(1) << 8 * in.mode) - 1;
            whole |= static_cast<T>(get<u32>(warp, in.at[i], lane) & kept) << 8 * in.mode * i;
        }
        put<T>(warp, in.at[8], lane, whole);
    });
}

void move_pieces(Assembler &assembler, const Statement &s, Instruction &in) {
    const bool apart = s.operands[0][0] == '{';
    const std::vector<std::string> pieces = elements(s.operands[apart ? 0 : 1]);
    const int size = type_size(s.type());
    in.mode = size / pieces.size();
    for (const std::string &piece : pieces) in.at[in.count++] = piece == "_" ? NONE : assembler.operand(piece, 4);
    in.at[8] = assembler.operand(s.operands[apart ? 1 : 0], size);
    const Run narrow = apart ? take_apart<u32> : put_together<u32>, wide = apart ? take_apart<u64> : put_together<u64>;
    in.run = size == 8 ? wide : narrow;
}

// ----------------------------------------------------------------------------------------------- spaces of addresses

// mode: 1 from generic addresses to those of shared memory, -1 back, 0 where both are the same.
void convert_address(Warp &warp, const Instruction &in, u32 mask) {
    const u64 start = reinterpret_cast<u64>(warp.block->shared) * in.mode;
    each_lane(mask, [&](int lane) { put<u64>(warp, in.at[0], lane, get<u64>(warp, in.at[1], lane) - start); });
}

void space_of_address(Assembler &assembler, const Statement &s, Instruction &in) {
    in.at[0] = assembler.operand(s.operands[0], 8);
    in.at[1] = assembler.operand(s.operands[1], 8);
    if (s.has("shared")) in.mode = s.has("to") ? 1 : -1;
    in.run = convert_address;
}

void nothing(Warp &, const Instruction &, u32) {}

}  // namespace

bool memory_instruction(Assembler &assembler, const Statement &s, Instruction &in) {
    const std::string &name = s.parts[0];
    if (name == "ld" || name == "st") {
        load_or_store(assembler, s, in);
    } else if (name == "atom" || name == "red") {
        atomic(assembler, s, in);
    } else if (name == "mov" && s.text.find('{') != std::string::npos) {
        move_pieces(assembler, s, in);
    } else if (name == "cvta") {
        space_of_address(assembler, s, in);
    } else if (name == "membar" || name == "fence" || name == "prefetch" || name == "createpolicy") {
        in.run = nothing;  // hints; and what a lane writes is seen at once
    } else {
        return false;
    }
    return in.run != nullptr;
}
