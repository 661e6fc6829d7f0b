// What the environment says; `python tests/emulator` sets it.
#pragma once
#include <stdlib.h>

// EMULATOR_PTX: the folder of the kernels' PTX. EMULATOR_REPORT: a file that gets a line for each kernel that ran.
inline const char *setting(const char *name) { return getenv(name); }
inline int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value != nullptr ? atoi(value) : otherwise;
}

inline int num_cards() { return setting("EMULATOR_CARDS", 1); }
// The most that a block may have; 101376 on compute capability 8.6, 8.9 and 12.0.
inline int shared_limit() { return setting("EMULATOR_SHARED", 166912); }
// In which order blocks and warps run: 0 as they come, -1 backwards, else a random one. No result may depend on it.
inline int order() { return setting("EMULATOR_ORDER", 0); }
