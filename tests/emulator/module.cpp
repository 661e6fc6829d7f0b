#include "module.h"

#include <string.h>

#include <algorithm>
#include <fstream>
#include <regex>
#include <sstream>

#include "memory.h"

namespace {

std::string without_comments(const std::string &path) {
    std::ifstream file(path);
    std::stringstream all;
    all << file.rdbuf();
    std::string text = all.str();
    for (size_t at = text.find("//"); at != std::string::npos; at = text.find("//", at)) {
        const size_t end = std::min(text.find('\n', at), text.size());
        std::fill(text.begin() + at, text.begin() + end, ' ');
    }
    return text;
}

// Behind the brace that closes the one at `open`.
size_t behind_braces(const std::string &text, size_t open) {
    int depth = 0;
    size_t at = open;
    do {
        depth += text[at] == '{' ? 1 : text[at] == '}' ? -1 : 0;
        at++;
    } while (depth > 0 && at < text.size());
    return at;
}

// Behind ".func (results) ", or ".entry ".
std::string name_of(const std::string &head, size_t behind) {
    std::string rest = trim(head.substr(behind));
    if (rest[0] == '(') rest = trim(rest.substr(rest.find(')') + 1));
    return trim(rest.substr(0, rest.find('(')));
}

// Of the device, with what it starts with; the rest is zero.
void place(Variable &variable, const std::string &initial) {
    variable.address = allocate(variable.size);
    memset(variable.address, 0, variable.size);
    static const std::regex number("0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|-?\\w+");
    u8 *to = static_cast<u8 *>(variable.address);
    for (std::sregex_iterator it(initial.begin(), initial.end(), number), end; it != end; ++it) {
        const std::string v = it->str();
        const bool bits = v[0] == '0' && strchr("fFdD", v[1]) != nullptr && v[1] != 0;
        const u64 value = bits ? strtoull(v.c_str() + 2, nullptr, 16) : strtoull(v.c_str(), nullptr, 0);
        memcpy(to, &value, variable.element);
        to += variable.element;
    }
}

// One declaration or definition from `at` on; where the next starts.
size_t read_part(Module &module, const std::string &text, size_t at) {
    const size_t semicolon = std::min(text.find(';', at), text.size());
    const size_t open = std::min(text.find('{', at), text.size());
    const std::string head = text.substr(at, std::min(open, semicolon) - at);
    const size_t entry = head.find(".entry"), func = head.find(".func");
    if (entry == std::string::npos && func == std::string::npos) {
        const std::string all = text.substr(at, semicolon - at);
        std::string name, initial;
        Variable variable;
        if (read_variable(all, name, variable, initial)) {
            if (!variable.shared) place(variable, initial);
            module.variables[name] = variable;
        }
        return semicolon + 1;
    }
    if (semicolon < open) return semicolon + 1;  // a prototype
    const size_t end = behind_braces(text, open);
    const int line = 1 + std::count(text.begin(), text.begin() + open, '\n');
    const bool kernel = entry != std::string::npos;
    const std::string name = kernel ? name_of(head, entry + 6) : name_of(head, func + 5);
    (kernel ? module.kernels : module.functions)[name] = {head, text.substr(open + 1, end - open - 2), line};
    return end;
}

}  // namespace

std::string trim(const std::string &text) {
    const char *blank = " \t\r\n";
    const size_t first = text.find_first_not_of(blank), last = text.find_last_not_of(blank);
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

size_t type_size(const std::string &type) {
    return type == "pred" || type.size() < 2 ? 0 : strtoul(type.c_str() + 1, nullptr, 10) / 8;
}

std::vector<Parameter> parameters(const std::string &text) {
    static const std::regex pattern(
        "\\.param\\s+(?:\\.align\\s+(\\d+)\\s+)?\\.(\\w+)\\s+"
        "(?:\\.ptr\\s+(?:\\.[a-z]\\w*\\s+)*(?:\\.align\\s+\\d+\\s+)?)?"
        "([\\w$]+)(?:\\[(\\d+)\\])?");
    std::vector<Parameter> found;
    for (std::sregex_iterator it(text.begin(), text.end(), pattern), end; it != end; ++it) {
        const std::smatch &m = *it;
        const size_t each = type_size(m[2]), count = m[4].matched ? std::stoul(m[4]) : 1;
        found.push_back({m[3], each * count, m[1].matched ? std::stoul(m[1]) : each});
    }
    return found;
}

bool read_variable(const std::string &text, std::string &name, Variable &variable, std::string &initial) {
    static const std::regex pattern(
        "\\.(shared|global|const)\\s+(?:\\.align\\s+(\\d+)\\s+)?\\.(\\w+)\\s+([\\w$]+)(?:\\[(\\d*)\\])?"
        "(?:\\s*=\\s*([^;]*))?");
    std::smatch m;
    if (!std::regex_search(text, m, pattern)) return false;
    const size_t each = type_size(m[3]), count = m[5].length() != 0 ? std::stoul(m[5]) : 1;
    name = m[4], initial = m[6];
    variable.shared = m[1] == "shared";
    variable.element = each;
    variable.align = m[2].matched ? std::stoul(m[2]) : each;
    variable.sized = !m[5].matched || m[5].length() != 0;
    variable.size = each * count;
    return true;
}

Module read_module(const std::string &path) {
    Module module;
    module.path = path;
    const std::string text = without_comments(path);
    size_t at = 0;
    while ((at = text.find_first_not_of(" \t\r\n", at)) != std::string::npos) {
        // These end with their line, others with a semicolon or braces.
        bool is_line = false;
        for (const char *word : {".version", ".target", ".address_size", ".file"}) {
            is_line |= text.compare(at, strlen(word), word) == 0;
        }
        at = is_line ? std::min(text.find('\n', at), text.size()) : read_part(module, text, at);
    }
    return module;
}
