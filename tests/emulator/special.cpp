#include "special.h"

namespace {

const char *const NAMES[] = {"%tid.x",   "%tid.y",   "%tid.z",    "%ntid.x",   "%ntid.y",   "%ntid.z", "%ctaid.x",
                             "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid"};

}  // namespace

int special_register(const std::string &name) {
    const auto found = std::find(std::begin(NAMES), std::end(NAMES), name);
    return found == std::end(NAMES) ? NONE : found - std::begin(NAMES);
}

u32 special_value(int number, const Warp &warp, Dim grid, Dim block, int lane) {
    const u32 thread = warp.index * LANES + lane;
    const Dim at = warp.block->at;
    const u32 values[] = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y,
                          block.x,          block.y,                    block.z,
                          at.x,             at.y,                       at.z,
                          grid.x,           grid.y,                     grid.z,
                          static_cast<u32>(lane), static_cast<u32>(warp.index)};
    return values[number];
}
