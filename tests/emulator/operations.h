// The operations that each lane does for itself on registers.
#pragma once
#include "machine.h"

struct Operation {
    std::vector<int> sizes;  // of its operands, destination first: 8 or 4 bytes, 0 for predicates
    Run run;
};

// Null where there is none of that name ("add.s32").
const Operation *find_operation(const std::string &opcode);
