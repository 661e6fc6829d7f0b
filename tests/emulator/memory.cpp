#include "memory.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <mutex>

#include "lanes.h"

namespace {

// Never destroyed: threads may still ask while the process ends.
std::mutex &lock = *new std::mutex;
std::map<u64, size_t> &allocations = *new std::map<u64, size_t>;
std::atomic<u64> changes{1};  // of them

// The allocations that a thread touched last, so that it need not ask for the lock.
struct Seen {
    u64 from = 0, to = 0, change = 0;
};
thread_local Seen seen[8];
thread_local int oldest;

bool is_allocated(u64 p, size_t size) {
    const u64 now = changes.load(std::memory_order_relaxed);
    for (const Seen &s : seen) {
        if (s.change == now && p >= s.from && p + size <= s.to) return true;
    }
    std::lock_guard<std::mutex> held(lock);
    auto next = allocations.upper_bound(p);
    if (next == allocations.begin()) return false;
    const auto &[start, length] = *--next;
    if (p + size > start + length) return false;
    seen[oldest++ % 8] = {start, start + length, now};
    return true;
}

bool is_within(u64 p, size_t size, const u8 *start, size_t length) {
    const u64 from = reinterpret_cast<u64>(start);
    return p >= from && p + size <= from + length;
}

// Shared, local or a parameter.
bool is_own(const Warp &warp, u64 p, size_t size) {
    const Block &block = *warp.block;
    return is_within(p, size, block.shared, block.shared_bytes) ||
           is_within(p, size, warp.local.data(), warp.local.size()) ||
           is_within(p, size, block.parameters->data(), block.parameters->size());
}

}  // namespace

void *allocate(size_t size) {
    constexpr size_t PAGE = 4096;
    size = size != 0 ? size : 1;
    void *p = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    if (p == nullptr) return p;
    memset(p, 0xff, size);
    std::lock_guard<std::mutex> held(lock);
    allocations[reinterpret_cast<u64>(p)] = size;
    changes++;
    return p;
}

bool release(void *p) {
    {
        std::lock_guard<std::mutex> held(lock);
        if (allocations.erase(reinterpret_cast<u64>(p)) == 0) return false;
        changes++;
    }
    free(p);
    return true;
}

u8 *resolve(const Warp &warp, const Instruction &in, const Address &address, size_t size, size_t align, int lane) {
    u64 p = address.wide ? get<u64>(warp, address.at, lane) : get<u32>(warp, address.at, lane);
    p += address.offset;
    if (p % align != 0) fail(&warp, &in, "lane %d: %zu bytes at %#lx, not aligned to %zu", lane, size, p, align);
    if (address.space == SHARED) {
        const Block &block = *warp.block;
        p &= 0xffffffff;
        if (p + size > block.shared_bytes) {
            fail(&warp, &in, "lane %d: %zu bytes at %lu of %zu in shared memory", lane, size, p, block.shared_bytes);
        }
        return block.shared + p;
    }
    const bool may_be_global = address.space == GLOBAL || address.space == GENERIC;
    const bool may_be_own = address.space != GLOBAL;
    if (!(may_be_own && is_own(warp, p, size)) && !(may_be_global && is_allocated(p, size))) {
        fail(&warp, &in, "lane %d: %zu bytes at %#lx, which nobody allocated", lane, size, p);
    }
    return reinterpret_cast<u8 *>(p);
}
