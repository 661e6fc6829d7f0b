// Grids: some blocks at a time, all of their warps in turns, on the thread that launches.
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "lanes.h"
#include "settings.h"
#include "special.h"

namespace {

// What standard error was when the process started: pytest takes the later one, and has no time to show it.
FILE *const messages = fdopen(dup(2), "w");

class Order {
  public:
    explicit Order(int seed) : seed(seed), state(seed * 0x9e3779b97f4a7c15u + 1) {}
    size_t block(size_t i, size_t count) const { return seed < 0 ? count - 1 - i : i; }
    // Calls `f` for each of `count` warps.
    template <class F>
    void each_warp(size_t count, F f) {
        const size_t from = seed > 0 ? random() % count : 0;
        const bool backwards = seed > 0 ? random() & 1 : seed < 0;
        for (size_t i = 0; i < count; i++) f((from + (backwards ? count - 1 - i : i)) % count);
    }
    long turn() { return seed > 0 ? 50 + random() % 4000 : 100000; }

  private:
    int seed;
    u64 state;
    u64 random() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    }
};

void start_warp(Warp &warp, Block &block, const Kernel &kernel, int index, Dim grid, Dim size) {
    constexpr size_t ALIGN = 64;
    warp.kernel = &kernel, warp.block = &block, warp.index = index;
    warp.memory.reset(new u8[kernel.arena.size() + ALIGN]);
    warp.arena = warp.memory.get() + ALIGN - reinterpret_cast<u64>(warp.memory.get()) % ALIGN;
    memcpy(warp.arena, kernel.arena.data(), kernel.arena.size());
    warp.local.assign(kernel.local_bytes * LANES, 0xff);
    for (int lane = 0; lane < LANES; lane++) {
        if (index * LANES + lane < static_cast<int>(size.size())) warp.live |= 1u << lane;
        for (const auto &[number, at] : kernel.special) {
            put<u32>(warp, at, lane, special_value(number, warp, grid, size, lane));
        }
        for (const Kernel::Base &base : kernel.bases) {
            u64 start = kernel.dynamic_at();
            if (base.space == PARAMETERS) start = reinterpret_cast<u64>(block.parameters->data());
            if (base.space == LOCAL) start = reinterpret_cast<u64>(warp.local.data() + lane * kernel.local_bytes);
            if (base.size == 8) {
                put<u64>(warp, base.at, lane, start + base.offset);
            } else {
                put<u32>(warp, base.at, lane, start + base.offset);
            }
        }
    }
    warp.groups.assign(1, {0, warp.live, false});
}

std::unique_ptr<Block> start_block(const Kernel &kernel, size_t number, Dim grid, Dim size, size_t dynamic_shared,
                                   const std::vector<u8> &parameters) {
    constexpr size_t ALIGN = 1024;
    auto block = std::make_unique<Block>();
    block->at = {static_cast<u32>(number % grid.x), static_cast<u32>(number / grid.x % grid.y),
                 static_cast<u32>(number / grid.x / grid.y)};
    block->shared_bytes = kernel.dynamic_at() + dynamic_shared;
    block->memory.assign(block->shared_bytes + ALIGN, 0xff);
    block->shared = block->memory.data() + ALIGN - reinterpret_cast<u64>(block->memory.data()) % ALIGN;
    block->parameters = &parameters;
    block->warps.resize((size.size() + LANES - 1) / LANES);
    block->running = block->warps.size();
    for (int i = 0; i < block->running; i++) start_warp(block->warps[i], *block, kernel, i, grid, size);
    return block;
}

// A turn for each warp that waits for nothing. Whether there was one.
bool run_block(Block &block, Order &order) {
    bool any = false;
    order.each_warp(block.warps.size(), [&](size_t i) {
        Warp &warp = block.warps[i];
        if (warp.done || warp.barrier != NONE) return;
        any = true;
        run_warp(warp, order.turn());
    });
    return any;
}

void say_who_waits(const Block &block) {
    for (const Warp &warp : block.warps) {
        if (warp.done) continue;
        const int at = warp.groups[0].at;
        fprintf(messages, "warp %d at barrier %d, line %d\n", warp.index, warp.barrier, warp.kernel->lines[at]);
    }
}

}  // namespace

void run_grid(const Kernel &kernel, Dim grid, Dim size, size_t dynamic_shared, const std::vector<u8> &parameters) {
    constexpr size_t MOST = 512;
    const size_t count = grid.size();
    Order order(::order());
    std::vector<std::unique_ptr<Block>> blocks;
    size_t started = 0, at_once = 2;
    int rounds = 0;  // since a block ended
    while (started < count || !blocks.empty()) {
        while (blocks.size() < at_once && started < count) {
            const size_t number = order.block(started++, count);
            blocks.push_back(start_block(kernel, number, grid, size, dynamic_shared, parameters));
        }
        bool any = false;
        for (size_t i = 0; i < blocks.size();) {
            any |= run_block(*blocks[i], order);
            if (blocks[i]->running != 0) {
                i++;
                continue;
            }
            blocks.erase(blocks.begin() + i);
            rounds = 0, any = true;
        }
        if (!any) {
            say_who_waits(*blocks[0]);
            fail(&blocks[0]->warps[0], nullptr, "all warps wait");
        }
        // They may wait for other blocks, or for other ranks.
        if (++rounds > 3) at_once = std::min(at_once + 1, MOST);
        if (rounds > 8) sched_yield();
    }
}

void fail(const Warp *warp, const Instruction *in, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("\nemulator: ", messages);
    vfprintf(messages, format, arguments);
    va_end(arguments);
    if (warp != nullptr) {
        const Kernel &kernel = *warp->kernel;
        const Dim at = warp->block->at;
        fprintf(messages, "\nin warp %d of block %u,%u,%u of %s", warp->index, at.x, at.y, at.z, kernel.name.c_str());
        if (in != nullptr) {
            const size_t i = in - kernel.code.data();
            fprintf(messages, "\n%s:%d: %s", kernel.file.c_str(), kernel.lines[i], kernel.texts[i].c_str());
        }
    }
    fputc('\n', messages);
    fflush(messages);
    abort();
}
