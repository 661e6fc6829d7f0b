// What an emulated kernel is, and what runs it: instructions, warps, blocks.
//
// The registers of a warp, its constants and its special registers lie in one arena; an operand is an offset there. A
// register has a place for each of 32 lanes, of 4 bytes, or 8 where it is that wide; a predicate is one word, a bit for
// each lane.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

typedef uint8_t u8;
typedef int8_t s8;
typedef uint16_t u16;
typedef int16_t s16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;
typedef float f32;
typedef double f64;

constexpr int LANES = 32, NONE = -1;
constexpr u32 ALL_LANES = 0xffffffffu;

struct Warp;
struct Instruction;
// Does an instruction for the lanes of a mask.
typedef void (*Run)(Warp &warp, const Instruction &in, u32 mask);

enum Kind : u8 {
    PLAIN,     // each lane for itself
    TOGETHER,  // by all lanes of a mask at once
    BRANCH,
    CALL,
    RETURN,
    EXIT,
    BARRIER,
    PAUSE,
    TRAP,
};
enum AtBarrier { MEET, ARRIVE, MEET_OR };  // MEET_OR: and takes whether any thread's predicate is set
enum Space : u8 { GLOBAL, SHARED, LOCAL, PARAMETERS, GENERIC };

// [register + offset]
struct Address {
    int at = NONE;
    bool wide = true;  // a register of 64 bits
    s64 offset = 0;
    Space space = GENERIC;
};

struct Instruction {
    Run run = nullptr;
    Kind kind = PLAIN;
    int guard = NONE;  // a predicate
    bool unless = false;
    int at[16];               // operands, destinations first; which is which is said where they are read
    Address address, source;  // `source` of copies
    int count = 0;            // elements of a vector, or bytes
    int mode = 0;             // one of several that share a function
    bool negated = false;     // a predicate among the operands
    int members = NONE;       // of TOGETHER: the lanes that have to be there; all where there is none
    int target = NONE;        // of branches and calls
    Instruction() { std::fill(at, at + 16, NONE); }
};

// A place in the lanes' own memory.
struct Place {
    s64 at = 0;
    size_t size = 0;
};

struct Pass {
    s64 to, from;
    size_t size;
};

struct Kernel {
    std::string name, file;
    std::vector<Instruction> code;
    std::vector<int> lines;          // of the file, for each instruction
    std::vector<std::string> texts;  // the same as they stand there
    std::vector<u8> arena;           // as a warp finds it
    size_t static_shared = 0;        // shared memory that is declared; what the launch asks for lies behind it
    size_t local_bytes = 0;          // of a lane
    std::vector<Place> parameters;
    size_t parameter_bytes = 0;
    size_t most_threads = 1024;  // of a block
    std::map<int, int> special;  // special registers that it reads, by number, and where they lie
    // Registers that hold the address of something, known when a warp starts.
    struct Base {
        Space space;
        s64 offset;
        int size, at;
    };
    std::vector<Base> bases;
    std::map<int, std::vector<Pass>> passed;  // by instruction: what a call copies to its function, what it takes back
    size_t dynamic_at() const { return (static_shared + 127) / 128 * 128; }
};

struct Dim {
    u32 x, y, z;
    size_t size() const { return static_cast<size_t>(x) * y * z; }
};

// An asynchronous copy that is not done yet: `given` bytes, then zeros.
struct Copy {
    u8 *to;
    const u8 *from;
    size_t given, size;
};

struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> closed;  // groups, the oldest first
};

// warp_operations.cpp: does those that are left.
void finish(Copies &copies);

// Lanes that are at one place.
struct Group {
    int at;
    u32 mask;
    bool waits;  // for other lanes of the warp
};

struct Block;
struct Warp {
    const Kernel *kernel = nullptr;
    Block *block = nullptr;
    int index = 0;
    std::unique_ptr<u8[]> memory;  // of the arena, which starts where 64 divides
    u8 *arena = nullptr;
    std::vector<u8> local;
    std::vector<Copies> copies;  // of each lane
    std::vector<Group> groups;   // one where all lanes are together
    u32 live = 0;                // lanes that have not ended
    int barrier = NONE;          // what it waits at
    u32 choices = 0;             // between groups
    bool done = false;
};

struct Barrier {
    int arrived = 0;  // threads
    int needed = 0;   // 0: all of the block
    bool any = false;
};

struct Block {
    Dim at;
    std::vector<u8> memory;
    u8 *shared = nullptr;
    size_t shared_bytes = 0;
    const std::vector<u8> *parameters = nullptr;
    std::vector<Warp> warps;
    int running = 0;  // of them
    Barrier barriers[16];
};

// Ends the process: what is wrong, and where.
[[noreturn]] __attribute__((format(printf, 3, 4)))
void fail(const Warp *warp, const Instruction *in, const char *format, ...);

// kernels.cpp: the kernel of that name in the PTX of EMULATOR_PTX.
std::shared_ptr<const Kernel> find_kernel(const std::string &name);
// Adds those of one more file.
void read_ptx(const std::string &path);
// Sees that each can be read. How many there are.
int assemble_all();

// grid.cpp
void run_grid(const Kernel &kernel, Dim grid, Dim block, size_t dynamic_shared, const std::vector<u8> &parameters);

// warp.cpp: until it waits, pauses, has ended or used up `turn` instructions.
void run_warp(Warp &warp, long turn);
