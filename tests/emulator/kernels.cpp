// The kernels of all PTX that was read, assembled when they are first asked for.
#include <dirent.h>

#include <mutex>

#include "assembler.h"
#include "settings.h"

namespace {

struct Library {
    std::mutex lock;
    bool read = false;
    std::deque<Module> modules;  // they do not move
    std::map<std::string, const Module *> owners;  // of kernels, by name
    std::map<std::string, std::shared_ptr<const Kernel>> kernels;
};

// Never destroyed: threads may still launch while the process ends.
Library &library = *new Library;

void add(const std::string &path) {
    library.modules.push_back(read_module(path));
    const Module &module = library.modules.back();
    for (const auto &kernel : module.kernels) library.owners[kernel.first] = &module;
}

void read_all() {
    library.read = true;
    const char *folder = setting("EMULATOR_PTX");
    DIR *entries = folder != nullptr ? opendir(folder) : nullptr;
    if (entries == nullptr) fail(nullptr, nullptr, "EMULATOR_PTX: no folder %s", folder != nullptr ? folder : "named");
    while (const dirent *entry = readdir(entries)) {
        const std::string name = entry->d_name;
        if (name.size() > 4 && name.substr(name.size() - 4) == ".ptx") add(std::string(folder) + "/" + name);
    }
    closedir(entries);
}

std::shared_ptr<const Kernel> assemble(const std::string &name) {
    auto &kernel = library.kernels[name];
    if (kernel != nullptr) return kernel;
    const auto owner = library.owners.find(name);
    if (owner == library.owners.end()) fail(nullptr, nullptr, "no PTX of %s", name.c_str());
    auto made = std::make_shared<Kernel>();
    Assembler(*owner->second, *made).assemble(name);
    return kernel = made;
}

}  // namespace

std::shared_ptr<const Kernel> find_kernel(const std::string &name) {
    std::lock_guard<std::mutex> held(library.lock);
    if (!library.read) read_all();
    return assemble(name);
}

void read_ptx(const std::string &path) {
    std::lock_guard<std::mutex> held(library.lock);
    add(path);
}

int assemble_all() {
    std::lock_guard<std::mutex> held(library.lock);
    if (!library.read) read_all();
    for (const auto &owner : library.owners) assemble(owner.first);
    return library.owners.size();
}
