// The text of one file of PTX, in parts.
#pragma once
#include "machine.h"

// A kernel or a function: what stands before its braces, and what is between them.
struct Body {
    std::string head, text;
    int line;  // of the file, where the text starts
};

struct Variable {
    bool shared;  // of a block; otherwise of the device
    bool sized;   // otherwise it is what the launch asks for
    size_t element, size, align;
    void *address = nullptr;  // of the device's
};

struct Parameter {
    std::string name;
    size_t size, align;
};

struct Module {
    std::string path;
    std::map<std::string, Body> kernels, functions;
    std::map<std::string, Variable> variables;
};

Module read_module(const std::string &path);

std::string trim(const std::string &text);
// Of "f32" and the like, in bytes; 0 of predicates.
size_t type_size(const std::string &type);
// All ".param" of a text.
std::vector<Parameter> parameters(const std::string &text);
// ".shared .align 16 .b8 name[64]": false where that is none. Sets `initial` to what it starts with.
bool read_variable(const std::string &text, std::string &name, Variable &variable, std::string &initial);
