// Memory that kernels may touch: what was allocated, and nothing else.
#pragma once
#include "machine.h"

// Filled with NaN. Null where the machine has no more.
void *allocate(size_t size);
// False where that was not allocated.
bool release(void *p);

// Where `size` bytes are that lane `lane` finds at an address; ends the process where it may not, or where `align` does
// not divide the address.
u8 *resolve(const Warp &warp, const Instruction &in, const Address &address, size_t size, size_t align, int lane);
inline u8 *resolve(const Warp &warp, const Instruction &in, const Address &address, size_t size, int lane) {
    return resolve(warp, in, address, size, size, lane);
}
