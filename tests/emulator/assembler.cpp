#include "assembler.h"

#include <string.h>

#include <algorithm>
#include <regex>

#include "lanes.h"
#include "numbers.h"
#include "operations.h"
#include "special.h"

bool Statement::has(const char *part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

std::vector<std::string> split(const std::string &list) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (char c : list) {
        depth += strchr("{[(", c) != nullptr ? 1 : strchr("}])", c) != nullptr ? -1 : 0;
        if (c == ',' && depth == 0) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    for (std::string &part : parts) part = trim(part);
    if (parts.back().empty()) parts.pop_back();
    return parts;
}

std::vector<std::string> elements(const std::string &operand) {
    if (operand[0] != '{') return {operand};
    return split(operand.substr(1, operand.size() - 2));
}

namespace {

Statement parse(const std::string &text) {
    Statement s;
    s.text = text;
    const size_t end = std::min(text.find_first_of(" \t\n{[("), text.size());
    s.opcode = text.substr(0, end);
    s.operands = split(text.substr(end));
    size_t at = 0;
    for (size_t dot; (dot = s.opcode.find('.', at)) != std::string::npos; at = dot + 1) {
        s.parts.push_back(s.opcode.substr(at, dot - at));
    }
    s.parts.push_back(s.opcode.substr(at));
    return s;
}

bool is_number(const std::string &text) { return isdigit(text[0]) || text[0] == '-'; }

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

int place_size(size_t size) { return size == 8 ? 8 * LANES : size == 0 ? 4 : 4 * LANES; }

// After a call: what the function gave. at[0], at[1]: to and from in local memory.
void take_result(Warp &warp, const Instruction &in, u32 mask) {
    each_lane(mask, [&](int lane) {
        u8 *local = warp.local.data() + lane * warp.kernel->local_bytes;
        memcpy(local + in.at[0], local + in.at[1], in.count);
    });
}

}  // namespace

void Assembler::bad(const std::string &what) const {
    fail(nullptr, nullptr, "%s:%d: %s", module.path.c_str(), line, what.c_str());
}

// ------------------------------------------------------------------------------------------------------ operands

int Assembler::room(size_t size, size_t align) {
    const size_t at = round_up(kernel.arena.size(), align);
    kernel.arena.resize(at + size);
    return at;
}

int Assembler::constant(u64 value, int size) {
    if (size != 8) value &= 0xffffffff;
    const auto [it, is_new] = constants.try_emplace({value, size}, NONE);
    if (is_new) {
        it->second = room(place_size(size == 0 ? 4 : size));
        const int each = size == 8 ? 8 : 4;
        for (int lane = 0; lane < LANES; lane++) memcpy(&kernel.arena[it->second + each * lane], &value, each);
    }
    return it->second;
}

// Addresses in shared memory may be asked for with 4 bytes.
int Assembler::base(Space space, s64 offset, int size) {
    for (const Kernel::Base &base : kernel.bases) {
        if (base.space == space && base.offset == offset && base.size == size) return base.at;
    }
    kernel.bases.push_back({space, offset, size, room(place_size(size))});
    return kernel.bases.back().at;
}

int Assembler::special(const std::string &name) {
    const int number = special_register(name);
    if (number == NONE) return NONE;
    const auto [it, is_new] = kernel.special.try_emplace(number, NONE);
    if (is_new) it->second = room(place_size(4));
    return it->second;
}

const Assembler::Symbol *Assembler::find(const std::string &name) const {
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
        const auto found = scope->find(name);
        if (found != scope->end()) return &found->second;
    }
    return nullptr;
}

int Assembler::size_of(const std::string &text) const {
    const Symbol *symbol = find(text);
    return symbol != nullptr && symbol->kind == Symbol::REGISTER ? symbol->size : 0;
}

size_t Assembler::shared_room(size_t size, size_t align) {
    const size_t at = round_up(kernel.static_shared, std::max<size_t>(align, 1));
    kernel.static_shared = at + size;
    return at;
}

// The address of a variable of the module.
int Assembler::variable(const std::string &name, int size) {
    const auto found = module.variables.find(name);
    if (found == module.variables.end()) bad("unknown name " + name);
    const Variable &v = found->second;
    if (!v.shared) return constant(reinterpret_cast<u64>(v.address), 8);
    if (!v.sized) return base(SHARED, 0, size);
    const auto [it, is_new] = shared.try_emplace(name, 0);
    if (is_new) it->second = shared_room(v.size, v.align);
    return constant(it->second, size);
}

int Assembler::operand(const std::string &text, int size) {
    const Symbol *symbol = find(text);
    if (symbol != nullptr && symbol->kind == Symbol::REGISTER) {
        const int has = symbol->size == 8 ? 8 : symbol->size == 0 ? 0 : 4;
        if (has != size) bad(text + " has " + std::to_string(has) + " bytes, not " + std::to_string(size));
        return symbol->at;
    }
    return operand_of_any_size(text, size);
}

int Assembler::operand_of_any_size(const std::string &text, int size_of_number) {
    if (text.compare(0, 2, "0f") == 0) return constant(strtoull(text.c_str() + 2, nullptr, 16), 4);
    if (text.compare(0, 2, "0d") == 0) return constant(strtoull(text.c_str() + 2, nullptr, 16), 8);
    if (is_number(text)) {
        const u64 value = strtoull(text.c_str(), nullptr, 0);  // of a negative one, its two's complement
        return size_of_number == 0 ? constant(value != 0 ? ALL_LANES : 0, 4) : constant(value, size_of_number);
    }
    if (text == "WARP_SZ") return constant(LANES, size_of_number);
    if (text == "%globaltimer") return constant(0, 8);  // time stands still: nobody waits in vain
    if (const int at = special(text); at != NONE) return at;
    const Symbol *symbol = find(text);
    if (symbol == nullptr) return variable(text, size_of_number);
    switch (symbol->kind) {
        case Symbol::REGISTER: return symbol->at;
        case Symbol::IN_SHARED: return constant(symbol->at, size_of_number);
        case Symbol::IN_PARAMETERS: return base(PARAMETERS, symbol->at, 8);
        default: return base(LOCAL, symbol->at, 8);
    }
}

int Assembler::predicate(const std::string &text, bool &negated) {
    negated = text[0] == '!';
    return operand(negated ? text.substr(1) : text, 0);
}

Address Assembler::address(const std::string &text, Space space) {
    Address address;
    address.space = space;
    std::string name = trim(text.substr(1, text.find(']') - 1));
    const size_t plus = name.find('+');
    if (plus != std::string::npos) {
        address.offset = strtoll(name.c_str() + plus + 1, nullptr, 0);
        name = trim(name.substr(0, plus));
    }
    const Symbol *symbol = find(name);
    if (symbol != nullptr) {
        address.wide = symbol->kind == Symbol::REGISTER ? symbol->size == 8 : symbol->kind != Symbol::IN_SHARED;
        if (symbol->kind == Symbol::IN_LOCAL) address.space = LOCAL;
    } else {
        const auto found = module.variables.find(name);
        address.wide = found != module.variables.end() && !found->second.shared;
    }
    address.at = operand_of_any_size(name, 4);
    return address;
}

// -------------------------------------------------------------------------------------------------- declarations

s64 Assembler::local_room(size_t size, size_t align) {
    const size_t at = round_up(kernel.local_bytes, std::max<size_t>(align, 8));
    kernel.local_bytes = at + size;
    return at;
}

void Assembler::declare_registers(const std::string &type, const std::string &names) {
    const size_t size = type_size(type);
    const auto declare_one = [&](const std::string &name) {
        scopes.back()[name] = {Symbol::REGISTER, room(place_size(size), size == 0 ? 4 : 64), size};
    };
    for (const std::string &name : split(names)) {
        const size_t angle = name.find('<');  // "%r<9>" is %r0 to %r8
        if (angle == std::string::npos) {
            declare_one(name);
            continue;
        }
        const int count = std::stoi(name.substr(angle + 1));
        for (int i = 0; i < count; i++) declare_one(name.substr(0, angle) + std::to_string(i));
    }
}

void Assembler::declare(const std::string &text) {
    static const std::regex registers("\\.reg\\s+\\.(\\w+)\\s+([^;]*)");
    static const std::regex local(
        "\\.(param|local)\\s+(?:\\.align\\s+(\\d+)\\s+)?\\.(\\w+)\\s+([\\w$]+)(?:\\[(\\d+)\\])?");
    std::smatch m;
    std::string name, initial;
    Variable v;
    if (std::regex_match(text, m, registers)) {
        declare_registers(m[1], m[2]);
    } else if (std::regex_match(text, m, local)) {
        const size_t each = type_size(m[3]), size = each * (m[5].matched ? std::stoul(m[5]) : 1);
        const s64 at = local_room(size, m[2].matched ? std::stoul(m[2]) : each);
        scopes.back()[m[4]] = {Symbol::IN_LOCAL, at, size};
    } else if (read_variable(text, name, v, initial) && v.shared && v.sized) {
        scopes.back()[name] = {Symbol::IN_SHARED, static_cast<s64>(shared_room(v.size, v.align)), v.size};
    } else if (text.compare(0, 7, ".pragma") != 0) {
        bad("unknown declaration: " + text);
    }
}

// -------------------------------------------------------------------------------------------------- instructions

void Assembler::push(const Statement &s, const Instruction &in) {
    kernel.code.push_back(in);
    kernel.lines.push_back(line);
    kernel.texts.push_back(s.text);
}

void Assembler::operation(const Statement &s, Instruction &in) {
    const Operation &operation = *find_operation(s.opcode);
    if (s.operands.size() != operation.sizes.size()) bad("operands: " + s.text);
    in.run = operation.run;
    for (size_t i = 0; i < s.operands.size(); i++) {
        std::string text = s.operands[i];
        if (i > 0 && s.parts[0] == "cvt" && operation.sizes[i] == 4 && size_of(text) == 8) {
            // A conversion takes the low bits of a register that is wider than its type.
            Instruction narrow;
            narrow.run = find_operation("cvt.u32.u64")->run;
            narrow.at[0] = room(place_size(4)), narrow.at[1] = operand(text, 8);
            narrow.guard = in.guard, narrow.unless = in.unless;
            push(s, narrow);
            in.at[i] = narrow.at[0];
        } else {
            in.at[i] = operand(text, operation.sizes[i]);
        }
    }
}

// at: the barrier, the threads that meet at it (or NONE for all), and of those that reduce, what is given and taken.
void Assembler::barrier(const Statement &s, Instruction &in) {
    const bool reduces = s.has("red");
    std::vector<std::string> operands = s.operands;
    in.kind = BARRIER;
    in.mode = s.has("arrive") ? ARRIVE : reduces ? MEET_OR : MEET;
    if (reduces && (!s.has("or") || operands.size() < 3)) bad("unknown instruction: " + s.text);
    if (reduces) {
        bool negated;
        in.at[2] = predicate(operands.back(), in.negated);
        in.at[3] = predicate(operands.front(), negated);
        operands = {operands.begin() + 1, operands.end() - 1};
    }
    in.at[0] = operand(operands[0], 4);
    if (operands.size() > 1) in.at[1] = operand(operands[1], 4);
}

// "call.uni (result), name, (given, ...)": the second instruction takes the result.
void Assembler::call(const Statement &s, Instruction &in) {
    std::vector<std::string> operands = s.operands;
    Call call = {static_cast<int>(kernel.code.size()), "", {}, {}};
    const auto place = [&](const std::string &name) {
        const Symbol *symbol = find(name);
        if (symbol == nullptr) bad("unknown name " + name);
        return Place{symbol->at, symbol->size};
    };
    const auto inside = [](const std::string &text) { return trim(text.substr(1, text.size() - 2)); };
    if (operands[0][0] == '(') {
        call.result = place(inside(operands[0]));
        operands.erase(operands.begin());
    }
    call.function = operands[0];
    if (operands.size() > 1) {
        for (const std::string &name : split(inside(operands[1]))) call.given.push_back(place(name));
    }
    if (functions.count(call.function) == 0) functions[call.function].back = room(place_size(4));
    calls.push_back(call);
    in.kind = CALL;
    push(s, in);
    Instruction result;
    result.run = take_result;
    push(s, result);
}

bool Assembler::control(const Statement &s, Instruction &in) {
    const std::string &name = s.parts[0];
    if (name == "bra") {
        in.kind = BRANCH;
        jumps.push_back({kernel.code.size(), prefix + s.operands[0]});
    } else if (name == "ret" && function != nullptr) {
        in.kind = RETURN;
        in.at[0] = function->back;
    } else if (name == "ret" || name == "exit") {
        in.kind = EXIT;
    } else if (name == "trap") {
        in.kind = TRAP;
    } else if ((name == "bar" || name == "barrier") && !s.has("warp")) {
        barrier(s, in);
    } else if (name == "nanosleep") {
        in.kind = PAUSE;
    } else {
        return false;
    }
    return true;
}

void Assembler::statement(const std::string &text) {
    Instruction in;
    std::string rest = text;
    if (text[0] == '@') {
        const size_t end = text.find_first_of(" \t");
        in.guard = predicate(text.substr(1, end - 1), in.unless);
        rest = trim(text.substr(end));
    }
    const Statement s = parse(rest);
    const bool in_pieces = s.parts[0] == "mov" && rest.find('{') != std::string::npos;
    if (s.parts[0] == "call") return call(s, in);
    if (!in_pieces && find_operation(s.opcode) != nullptr) {
        operation(s, in);
    } else if (!control(s, in) && !memory_instruction(*this, s, in) && !warp_instruction(*this, s, in)) {
        bad("unknown instruction: " + text);
    }
    push(s, in);
}

// -------------------------------------------------------------------------------------------------------- bodies

// ".maxntid 256" or "256, 1, 1" before the braces.
size_t Assembler::most_threads(const std::string &head) {
    static const std::regex pattern("\\.maxntid\\s+(\\d+)(?:\\s*,\\s*(\\d+))?(?:\\s*,\\s*(\\d+))?");
    std::smatch m;
    if (!std::regex_search(head, m, pattern)) return 1024;
    size_t threads = 1;
    for (int i = 1; i < 4; i++) threads *= m[i].matched ? std::stoul(m[i]) : 1;
    return threads;
}

// Statements end with semicolons, labels with colons; braces that do not belong to a statement are scopes.
void Assembler::body(const Body &body) {
    const std::string &text = body.text;
    std::string current;
    int depth = 0;  // of braces in a statement
    line = body.line;
    scopes.emplace_back();
    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        line += c == '\n';
        if (current.empty() && isspace(c)) continue;
        if (current.empty() && c == '{') {
            scopes.emplace_back();
        } else if (current.empty() && c == '}') {
            scopes.pop_back();
        } else if (c == ';') {
            current = trim(current);
            if (current[0] == '.') {
                declare(current);
            } else if (!current.empty()) {
                statement(current);
            }
            current.clear();
        } else if (c == ':' && depth == 0 && text[i + 1] != ':' && current.find_first_of(". \t") == std::string::npos) {
            labels[prefix + current] = kernel.code.size();
            current.clear();
        } else {
            depth += c == '{' ? 1 : c == '}' ? -1 : 0;
            current += c;
        }
    }
    scopes.pop_back();
}

void Assembler::add_function(const std::string &name) {
    const auto found = module.functions.find(name);
    if (found == module.functions.end()) bad("unknown function " + name);
    Function &f = functions[name];
    f.entry = kernel.code.size();
    const std::string &head = found->second.head;
    const size_t behind_results = head.find(name);
    const auto place = [&](const Parameter &p) {
        const s64 at = local_room(p.size, p.align);
        scopes.back()[p.name] = {Symbol::IN_LOCAL, at, p.size};
        return Place{at, p.size};
    };
    scopes.assign(1, {});
    for (const Parameter &p : parameters(head.substr(0, behind_results))) f.result = place(p);
    for (const Parameter &p : parameters(head.substr(behind_results))) f.parameters.push_back(place(p));
    function = &f, prefix = name + "/";
    body(found->second);
}

// Where branches and calls go.
void Assembler::link() {
    for (const auto &[at, label] : jumps) {
        const auto found = labels.find(label);
        if (found == labels.end()) bad("unknown label " + label);
        kernel.code[at].target = found->second;
    }
    for (const Call &call : calls) {
        const Function &f = functions[call.function];
        Instruction &in = kernel.code[call.at], &result = kernel.code[call.at + 1];
        in.target = f.entry, in.at[0] = f.back;
        for (size_t i = 0; i < f.parameters.size(); i++) {
            kernel.passed[call.at].push_back({f.parameters[i].at, call.given.at(i).at, f.parameters[i].size});
        }
        result.at[0] = call.result.at, result.at[1] = f.result.at, result.count = call.result.size;
    }
}

void Assembler::assemble(const std::string &name) {
    const Body &kernel_body = module.kernels.at(name);
    kernel.name = name, kernel.file = module.path, kernel.most_threads = most_threads(kernel_body.head);
    scopes.emplace_back();
    for (const Parameter &p : parameters(kernel_body.head)) {
        const size_t at = round_up(kernel.parameter_bytes, p.align);
        scopes[0][p.name] = {Symbol::IN_PARAMETERS, static_cast<s64>(at), p.size};
        kernel.parameters.push_back({static_cast<s64>(at), p.size});
        kernel.parameter_bytes = at + p.size;
    }
    body(kernel_body);
    Statement end;
    Instruction leave;
    end.text = "(end of the kernel)";
    leave.kind = EXIT;
    push(end, leave);
    // Functions may call others, which are added at the end.
    for (size_t i = 0; i < calls.size(); i++) {
        if (functions[calls[i].function].entry == NONE) add_function(calls[i].function);
    }
    link();
    kernel.local_bytes = round_up(kernel.local_bytes, 16);
    room(0);
}
