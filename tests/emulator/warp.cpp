// Warps: lanes that go different ways and meet again.
//
// Lanes at one place are a group. Of several groups the one at the lowest place goes first, an instruction at a time,
// so that lanes meet where their ways join.
#include "lanes.h"

namespace {

// Groups at one place become one.
void merge(std::vector<Group> &groups) {
    for (size_t i = 0; i < groups.size(); i++) {
        for (size_t j = i + 1; j < groups.size();) {
            if (groups[i].at != groups[j].at) {
                j++;
                continue;
            }
            groups[i].mask |= groups[j].mask, groups[i].waits = false;
            groups.erase(groups.begin() + j);
        }
    }
}

// The lanes of `mask` go to `to`, the others of the group to `rest`.
void split(Warp &warp, size_t which, u32 mask, int to, int rest) {
    const u32 others = warp.groups[which].mask & ~mask;
    warp.groups[which] = {to, mask, false};
    warp.groups.push_back({rest, others, false});
}

// All groups wait. That lanes meet at different __syncwarp is allowed; all else would wait for ever.
void let_meet(Warp &warp) {
    const Kernel &kernel = *warp.kernel;
    for (const Group &group : warp.groups) {
        const bool meets = kernel.texts[group.at].compare(0, 8, "bar.warp") == 0;
        if (!meets) fail(&warp, &kernel.code[group.at], "lanes %08x wait for others of their warp", group.mask);
    }
    for (Group &group : warp.groups) group.at++, group.waits = false;
}

// The group that goes next: the one at the lowest place, and seldom the one at the highest, for lanes that wait for
// each other in loops.
size_t choose(Warp &warp) {
    constexpr u32 SELDOM = 1000;
    const bool highest = ++warp.choices % SELDOM == 0;
    merge(warp.groups);
    if (warp.groups.size() == 1) return 0;
    int chosen = NONE;
    for (size_t i = 0; i < warp.groups.size(); i++) {
        if (warp.groups[i].waits) continue;
        if (chosen == NONE || highest != (warp.groups[i].at < warp.groups[chosen].at)) chosen = i;
    }
    if (chosen != NONE) return chosen;
    let_meet(warp);
    return choose(warp);
}

// Lets go on who waits at a barrier, if all are there.
void open_barrier(Block &block, int which) {
    Barrier &barrier = block.barriers[which];
    const int needed = barrier.needed != 0 ? barrier.needed : block.running * LANES;
    if (barrier.arrived == 0 || barrier.arrived < needed) return;
    for (Warp &warp : block.warps) {
        if (warp.barrier != which) continue;
        Group &group = warp.groups[0];
        const Instruction &in = warp.kernel->code[group.at];
        if (in.mode == MEET_OR) set_bits(warp, in.at[3], group.mask, barrier.any ? ALL_LANES : 0);
        warp.barrier = NONE;
        group.at++;
    }
    barrier = Barrier();
}

// Each of these is for some lanes of a group at least, and returns whether the group goes straight on.

bool meet_lanes(Warp &warp, Group &group, const Instruction &in, u32 mask) {
    u32 members = in.members != NONE ? get<u32>(warp, in.members, first_lane(mask)) : ALL_LANES;
    if (mask & ~members) fail(&warp, &in, "lanes %08x are not all among %08x", mask, members);
    members &= warp.live;
    if (mask != members) {
        if (warp.groups.size() == 1) fail(&warp, &in, "lanes %08x of %08x", mask, members);
        group.waits = true;
        return false;
    }
    in.run(warp, in, mask);
    group.at++;
    return true;
}

bool meet_warps(Warp &warp, Group &group, const Instruction &in, u32 mask) {
    if (mask != warp.live) {
        if (warp.groups.size() == 1) fail(&warp, &in, "a barrier for lanes %08x of %08x", mask, warp.live);
        group.waits = true;
        return false;
    }
    const u32 which = get<u32>(warp, in.at[0], first_lane(mask));
    const int needed = in.at[1] != NONE ? get<s32>(warp, in.at[1], first_lane(mask)) : 0;
    if (which > 15 || needed % LANES != 0) fail(&warp, &in, "barrier %u of %d threads", which, needed);
    Barrier &barrier = warp.block->barriers[which];
    if (barrier.arrived != 0 && barrier.needed != needed) {
        fail(&warp, &in, "barrier %u of %d threads, by others of %d", which, needed, barrier.needed);
    }
    barrier.needed = needed, barrier.arrived += LANES;
    if (in.mode == MEET_OR) barrier.any |= ((in.negated ? ~bits(warp, in.at[2]) : bits(warp, in.at[2])) & mask) != 0;
    if (in.mode == ARRIVE) {
        group.at++;
    } else {
        warp.barrier = which;
    }
    open_barrier(*warp.block, which);
    return warp.barrier == NONE;
}

bool branch(Warp &warp, size_t which, const Instruction &in, u32 mask) {
    Group &group = warp.groups[which];
    if (mask == group.mask) {
        group.at = in.target;
        return true;
    }
    split(warp, which, mask, in.target, group.at + 1);
    return false;
}

bool call(Warp &warp, Group &group, const Instruction &in, u32 mask) {
    if (mask != group.mask) fail(&warp, &in, "a call by lanes %08x of %08x", mask, group.mask);
    const auto passed = warp.kernel->passed.find(group.at);
    each_lane(mask, [&](int lane) {
        u8 *local = warp.local.data() + lane * warp.kernel->local_bytes;
        if (passed != warp.kernel->passed.end()) {
            for (const Pass &pass : passed->second) memcpy(local + pass.to, local + pass.from, pass.size);
        }
        put<s32>(warp, in.at[0], lane, group.at + 1);
    });
    group.at = in.target;
    return true;
}

// Lanes may have come from different calls.
bool return_from(Warp &warp, size_t which, const Instruction &in, u32 mask) {
    Group &group = warp.groups[which];
    const s32 back = get<s32>(warp, in.at[0], first_lane(mask));
    u32 same = 0;
    each_lane(mask, [&](int lane) { same |= static_cast<u32>(get<s32>(warp, in.at[0], lane) == back) << lane; });
    if (same == group.mask) {
        group.at = back;
        return true;
    }
    const u32 others = mask & ~same;
    split(warp, which, same, back, others != 0 ? group.at : group.at + 1);
    return false;
}

// Copies that nobody has waited for are done by now.
void carry_out_copies(Warp &warp, u32 mask) {
    if (warp.copies.empty()) return;
    each_lane(mask, [&](int lane) { finish(warp.copies[lane]); });
}

bool leave(Warp &warp, size_t which, const Instruction &, u32 mask) {
    Group &group = warp.groups[which];
    if (mask != group.mask) split(warp, which, mask, group.at, group.at + 1);
    carry_out_copies(warp, mask);
    warp.live &= ~mask;
    warp.groups.erase(warp.groups.begin() + which);
    for (Group &other : warp.groups) other.waits = false;  // for lanes that are gone
    return false;
}

bool control(Warp &warp, size_t which, const Instruction &in, u32 mask) {
    Group &group = warp.groups[which];
    switch (in.kind) {
        case TOGETHER: return meet_lanes(warp, group, in, mask);
        case BARRIER: return meet_warps(warp, group, in, mask);
        case BRANCH: return branch(warp, which, in, mask);
        case CALL: return call(warp, group, in, mask);
        case RETURN: return return_from(warp, which, in, mask);
        case EXIT: return leave(warp, which, in, mask);
        case PAUSE: group.at++; return false;
        default: fail(&warp, &in, "a trap, by lanes %08x", mask);
    }
}

void end(Warp &warp) {
    warp.done = true;
    warp.block->running--;
    for (int i = 0; i < 16; i++) open_barrier(*warp.block, i);
}

}  // namespace

void run_warp(Warp &warp, long turn) {
    const std::vector<Instruction> &code = warp.kernel->code;
    bool paused = false;
    while (turn > 0 && !paused && warp.barrier == NONE) {
        if (warp.groups.empty()) return end(warp);
        const bool alone = warp.groups.size() == 1;
        const size_t which = alone ? 0 : choose(warp);
        bool on = true;
        for (long steps = alone ? turn : 1; steps > 0 && on; steps--, turn--) {
            Group &group = warp.groups[which];
            const Instruction &in = code[group.at];
            u32 mask = group.mask;
            if (in.guard != NONE) mask &= in.unless ? ~bits(warp, in.guard) : bits(warp, in.guard);
            if (mask == 0) {
                group.at++;
            } else if (in.kind == PLAIN) {
                in.run(warp, in, mask);
                group.at++;
            } else {
                on = control(warp, which, in, mask);
                paused = in.kind == PAUSE;
            }
        }
    }
}
