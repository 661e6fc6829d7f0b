// What driver and run time share.
#pragma once
#include <functional>

#include "machine.h"

#define API extern "C" __attribute__((visibility("default")))

// Error codes of both.
enum Code { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_SUPPORTED = 801 };

constexpr size_t SHARED_UNASKED = 49152;  // what a block may have unless a kernel's attribute allows more

int current_card();
int card_attribute(int attribute);
// Does it at once, or records it where the stream is recorded.
void enqueue(void *stream, std::function<void()> work);
