// What the lanes of a warp do together (shuffles, votes, reductions, tensor cores), and asynchronous copies.
#include <limits>

#include "assembler.h"
#include "lanes.h"
#include "memory.h"
#include "numbers.h"

namespace {

// -------------------------------------------------------------------------------------------------------- shuffles

enum Shuffle { INDEX, BUTTERFLY, UP, DOWN };

// at: what a lane gets, whether it was there (or NONE), what it gives, from where, and the bounds.
void shuffle(Warp &warp, const Instruction &in, u32 mask) {
    u32 given[LANES], found = 0;
    for (int lane = 0; lane < LANES; lane++) given[lane] = get<u32>(warp, in.at[2], lane);
    each_lane(mask, [&](int lane) {
        const int by = get<u32>(warp, in.at[3], lane) & 31;
        const u32 bounds = get<u32>(warp, in.at[4], lane), segment = bounds >> 8 & 31, clamp = bounds & 31;
        const int first = lane & segment, last = first | (clamp & ~segment);
        int from;
        switch (in.mode) {
            case INDEX: from = first | (by & ~segment); break;
            case BUTTERFLY: from = lane ^ by; break;
            case UP: from = lane - by; break;
            default: from = lane + by;
        }
        const bool there = in.mode == UP ? from >= last : from <= last;
        if (!there) from = lane;
        if (!(mask >> from & 1)) fail(&warp, &in, "lane %d reads lane %d, which is not among %08x", lane, from, mask);
        put<u32>(warp, in.at[0], lane, given[from]);
        found |= static_cast<u32>(there) << lane;
    });
    if (in.at[1] != NONE) set_bits(warp, in.at[1], mask, found);
}

void make_shuffle(Assembler &assembler, const Statement &s, Instruction &in) {
    const std::string &to = s.operands[0];
    const size_t bar = to.find('|');
    bool negated;
    in.at[0] = assembler.operand(to.substr(0, bar), 4);
    if (bar != std::string::npos) in.at[1] = assembler.predicate(to.substr(bar + 1), negated);
    for (int i = 1; i < 4; i++) in.at[1 + i] = assembler.operand(s.operands[i], 4);
    in.members = assembler.operand(s.operands[4], 4);
    in.mode = s.has("idx") ? INDEX : s.has("bfly") ? BUTTERFLY : s.has("up") ? UP : DOWN;
    in.run = shuffle;
}

// ------------------------------------------------------------------------------------------- votes and reductions

u32 votes(const Warp &warp, const Instruction &in, u32 mask) {
    const u32 p = bits(warp, in.at[1]);
    return (in.negated ? ~p : p) & mask;
}

void ballot(Warp &warp, const Instruction &in, u32 mask) {
    const u32 found = votes(warp, in, mask);
    each_lane(mask, [&](int lane) { put<u32>(warp, in.at[0], lane, found); });
}
void all(Warp &warp, const Instruction &in, u32 mask) {
    set_bits(warp, in.at[0], mask, votes(warp, in, mask) == mask ? ALL_LANES : 0);
}
void any(Warp &warp, const Instruction &in, u32 mask) {
    set_bits(warp, in.at[0], mask, votes(warp, in, mask) != 0 ? ALL_LANES : 0);
}

void make_vote(Assembler &assembler, const Statement &s, Instruction &in) {
    bool negated;
    in.run = s.has("ballot") ? ballot : s.has("all") ? all : s.has("any") ? any : nullptr;
    in.at[0] = s.has("ballot") ? assembler.operand(s.operands[0], 4) : assembler.predicate(s.operands[0], negated);
    in.at[1] = assembler.predicate(s.operands[1], in.negated);
    in.members = assembler.operand(s.operands[2], 4);
}

template <class T, const auto &f>
void reduce(Warp &warp, const Instruction &in, u32 mask) {
    T found = get<T>(warp, in.at[1], first_lane(mask));
    each_lane(mask & (mask - 1), [&](int lane) { found = f(found, get<T>(warp, in.at[1], lane)); });
    each_lane(mask, [&](int lane) { put<T>(warp, in.at[0], lane, found); });
}

constexpr auto sum = [](u32 a, u32 b) { return a + b; };
constexpr auto either = [](u32 a, u32 b) { return a | b; };
constexpr auto both = [](u32 a, u32 b) { return a & b; };
constexpr auto least_of = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto most_of = [](auto a, auto b) { return a > b ? a : b; };

Run find_reduction(const Statement &s) {
    const bool is_signed = s.type() == "s32";
    if (s.has("add")) return reduce<u32, sum>;
    if (s.has("or")) return reduce<u32, either>;
    if (s.has("and")) return reduce<u32, both>;
    if (s.has("min")) return is_signed ? reduce<s32, least_of> : reduce<u32, least_of>;
    if (s.has("max")) return is_signed ? reduce<s32, most_of> : reduce<u32, most_of>;
    return nullptr;
}

void make_reduction(Assembler &assembler, const Statement &s, Instruction &in) {
    in.at[0] = assembler.operand(s.operands[0], 4);
    in.at[1] = assembler.operand(s.operands[1], 4);
    in.members = assembler.operand(s.operands[2], 4);
    in.run = find_reduction(s);
}

void active_lanes(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) { put<u32>(warp, in.at[0], lane, mask); });
}

void meet(Warp &, const Instruction &, u32) {}

// --------------------------------------------------------------------------------------------------- tensor cores

// D [16, 8] = A [16, 16] B [16, 8] + C. at: four of D, four of A, two of B, four of C. Sums are exact here and rounded
// once; a card drops bits below the largest term's.
void multiply(Warp &warp, const Instruction &in, u32 mask) {
    if (mask != ALL_LANES) fail(&warp, &in, "by lanes %08x", mask);
    f64 a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const int g = lane / 4, p = 2 * (lane % 4);
        for (int i = 0; i < 4; i++) {
            const u32 two = get<u32>(warp, in.at[4 + i], lane);
            f64 *to = &a[g + 8 * (i & 1)][p + 8 * (i >> 1)];
            to[0] = from_bf16(two & 0xffff), to[1] = from_bf16(two >> 16);
            c[g + 8 * (i >> 1)][p + (i & 1)] = get<f32>(warp, in.at[10 + i], lane);
        }
        for (int i = 0; i < 2; i++) {
            const u32 two = get<u32>(warp, in.at[8 + i], lane);
            b[p + 8 * i][g] = from_bf16(two & 0xffff), b[p + 8 * i + 1][g] = from_bf16(two >> 16);
        }
    }
    for (int i = 0; i < 16; i++) {
        f64 sums[8] = {};
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) sums[j] += a[i][k] * b[k][j];
        }
        for (int j = 0; j < 8; j++) c[i][j] += sums[j];
    }
    for (int lane = 0; lane < LANES; lane++) {
        const int g = lane / 4, p = 2 * (lane % 4);
        for (int i = 0; i < 4; i++) put<f32>(warp, in.at[i], lane, c[g + 8 * (i >> 1)][p + (i & 1)]);
    }
}

void make_multiply(Assembler &assembler, const Statement &s, Instruction &in) {
    if (s.opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") return;
    int at = 0;
    for (const std::string &operand : s.operands) {
        for (const std::string &element : elements(operand)) in.at[at++] = assembler.operand(element, 4);
    }
    in.run = multiply;
}

// Four matrices [8, 8] of 16 bits; lane i has the address of row i % 8 of matrix i / 8.
template <bool TRANSPOSED>
void load_matrices(Warp &warp, const Instruction &in, u32 mask) {
    if (mask != ALL_LANES) fail(&warp, &in, "by lanes %08x", mask);
    u16 m[4][8][8];
    for (int lane = 0; lane < LANES; lane++) memcpy(m[lane / 8][lane % 8], resolve(warp, in, in.address, 16, lane), 16);
    for (int i = 0; i < 4; i++) {
        for (int lane = 0; lane < LANES; lane++) {
            const int g = lane / 4, p = 2 * (lane % 4);
            const u32 low = TRANSPOSED ? m[i][p][g] : m[i][g][p], high = TRANSPOSED ? m[i][p + 1][g] : m[i][g][p + 1];
            put<u32>(warp, in.at[i], lane, high << 16 | low);
        }
    }
}

void make_load_matrices(Assembler &assembler, const Statement &s, Instruction &in) {
    const std::vector<std::string> to = elements(s.operands[0]);
    if (to.size() != 4 || !s.has("m8n8") || !s.has("b16")) return;
    for (int i = 0; i < 4; i++) in.at[i] = assembler.operand(to[i], 4);
    in.address = assembler.address(s.operands[1], SHARED);
    in.run = s.has("trans") ? load_matrices<true> : load_matrices<false>;
}

// ---------------------------------------------------------------------------------------------- asynchronous copies

void carry_out(const std::vector<Copy> &copies) {
    for (const Copy &copy : copies) {
        memset(copy.to, 0, copy.size);
        memcpy(copy.to, copy.from, copy.given);
    }
}

Copies &copies_of(Warp &warp, int lane) {
    if (warp.copies.empty()) warp.copies.resize(LANES);
    return warp.copies[lane];
}

// at[0]: bytes to be read, or NONE for all of `count`; the rest is zeros. Done when it is waited for.
void copy(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        const size_t all = in.count, given = in.at[0] != NONE ? get<u32>(warp, in.at[0], lane) : all;
        if (given > all) fail(&warp, &in, "lane %d copies %zu bytes", lane, given);
        u8 *to = resolve(warp, in, in.address, all, lane);
        const u8 *from = given != 0 ? resolve(warp, in, in.source, given, all, lane) : to;
        copies_of(warp, lane).open.push_back({to, from, given, all});
    });
}

void close_group(Warp &warp, const Instruction &, u32 mask) {
    each_lane(mask, [&](int lane) {
        Copies &copies = copies_of(warp, lane);
        copies.closed.push_back(std::move(copies.open));
        copies.open.clear();
    });
}

// Until `count` groups are left.
void wait_for_groups(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        Copies &copies = copies_of(warp, lane);
        while (static_cast<int>(copies.closed.size()) > in.count) {
            carry_out(copies.closed.front());
            copies.closed.pop_front();
        }
    });
}

void make_copy(Assembler &assembler, const Statement &s, Instruction &in) {
    if (s.has("commit_group")) {
        in.run = close_group;
    } else if (s.has("wait_group")) {
        in.count = std::stoi(s.operands[0]);
        in.run = wait_for_groups;
    } else if (s.has("shared") && s.has("global") && !s.has("bulk")) {
        // The last operand of a copy with a hint is the hint.
        const size_t operands = s.operands.size() - (s.has("L2::cache_hint") ? 1 : 0);
        in.address = assembler.address(s.operands[0], SHARED);
        in.source = assembler.address(s.operands[1], GLOBAL);
        in.count = std::stoi(s.operands[2]);
        if (operands == 4) in.at[0] = assembler.operand(s.operands[3], 4);
        in.run = copy;
    }
}

}  // namespace

void finish(Copies &copies) {
    for (const std::vector<Copy> &group : copies.closed) carry_out(group);
    carry_out(copies.open);
    copies = Copies();
}

bool warp_instruction(Assembler &assembler, const Statement &s, Instruction &in) {
    const std::string &name = s.parts[0];
    if (name == "cp" && s.has("async")) {
        make_copy(assembler, s, in);
        return in.run != nullptr;
    }
    if (name == "activemask") {
        in.at[0] = assembler.operand(s.operands[0], 4);
        in.run = active_lanes;
        return true;
    }
    in.kind = TOGETHER;
    if (name == "shfl") {
        make_shuffle(assembler, s, in);
    } else if (name == "vote") {
        make_vote(assembler, s, in);
    } else if (name == "redux") {
        make_reduction(assembler, s, in);
    } else if (name == "mma") {
        make_multiply(assembler, s, in);
    } else if (name == "ldmatrix") {
        make_load_matrices(assembler, s, in);
    } else if (s.opcode == "bar.warp.sync") {
        in.members = assembler.operand(s.operands[0], 4);
        in.run = meet;
    }
    if (in.run == nullptr) in.kind = PLAIN;
    return in.run != nullptr;
}
