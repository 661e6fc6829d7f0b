// From the text of a kernel to its instructions.
#pragma once
#include "machine.h"
#include "module.h"

// "ld.global.v2.f32 {%f1, %f2}, [%rd1+8];"
struct Statement {
    std::string text, opcode;
    std::vector<std::string> parts;     // "ld", "global", "v2", "f32"
    std::vector<std::string> operands;  // "{%f1, %f2}", "[%rd1+8]"
    bool has(const char *part) const;
    const std::string &type() const { return parts.back(); }
};

std::vector<std::string> split(const std::string &list);
// "{%f1, %f2}", or one alone.
std::vector<std::string> elements(const std::string &operand);

class Assembler {
  public:
    Assembler(const Module &module, Kernel &kernel) : module(module), kernel(kernel) {}
    void assemble(const std::string &name);

    // What those that know some of the instructions ask for. Where an operand lies: of 8 or 4 bytes, 0 for predicates.
    int operand(const std::string &text, int size);
    int operand_of_any_size(const std::string &text, int size_of_number = 4);
    // One with "!" before it or not.
    int predicate(const std::string &text, bool &negated);
    // Bytes of a register's place; 0 where that is no register.
    int size_of(const std::string &text) const;
    Address address(const std::string &text, Space space);
    [[noreturn]] void bad(const std::string &what) const;

  private:
    struct Symbol {
        enum { REGISTER, IN_LOCAL, IN_PARAMETERS, IN_SHARED } kind;
        s64 at;
        size_t size;
    };
    struct Function {
        int entry = NONE, back;  // its first instruction; where the way back is kept
        std::vector<Place> parameters;
        Place result;
    };
    struct Call {
        int at;
        std::string function;
        std::vector<Place> given;
        Place result;
    };
    typedef std::map<std::string, Symbol> Scope;

    const Module &module;
    Kernel &kernel;
    std::vector<Scope> scopes;
    std::map<std::pair<u64, int>, int> constants;
    std::map<std::string, size_t> shared;      // variables of the module that it uses
    std::map<std::string, int> labels;         // with the function's name before them
    std::vector<std::pair<int, std::string>> jumps;
    std::map<std::string, Function> functions;
    std::vector<Call> calls;
    std::string prefix;  // of labels
    Function *function = nullptr;
    int line = 0;

    int room(size_t size, size_t align = 64);
    int constant(u64 value, int size);
    int base(Space space, s64 offset, int size);
    int special(const std::string &name);
    int variable(const std::string &name, int size);
    const Symbol *find(const std::string &name) const;
    s64 local_room(size_t size, size_t align);
    size_t shared_room(size_t size, size_t align);
    void declare(const std::string &text);
    void declare_registers(const std::string &type, const std::string &names);
    void statement(const std::string &text);
    void operation(const Statement &s, Instruction &in);
    bool control(const Statement &s, Instruction &in);
    void call(const Statement &s, Instruction &in);
    void barrier(const Statement &s, Instruction &in);
    void push(const Statement &s, const Instruction &in);
    static size_t most_threads(const std::string &head);
    void body(const Body &body);
    void add_function(const std::string &name);
    void link();
};

// Each fills in an instruction of its kind, or says that it is none.
bool memory_instruction(Assembler &assembler, const Statement &s, Instruction &in);
bool warp_instruction(Assembler &assembler, const Statement &s, Instruction &in);
