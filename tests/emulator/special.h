// Special registers.
#pragma once
#include "machine.h"

// The number of "%tid.x" and the like; NONE where there is none of that name.
int special_register(const std::string &name);
// What lane `lane` reads there.
u32 special_value(int number, const Warp &warp, Dim grid, Dim block, int lane);
