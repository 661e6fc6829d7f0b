// What the run time answers that nvcc's code and our launchers call: kernels by name, their launches, the report.
#include <stdio.h>
#include <string.h>

#include <mutex>

#include "driver.h"
#include "settings.h"

namespace {

struct Function {
    std::string name;
    size_t allowed[8] = {};  // shared memory that the launch may ask for, by card
};

// Never destroyed: threads may still launch while the process ends.
std::mutex &lock = *new std::mutex;
std::map<const void *, Function> &functions = *new std::map<const void *, Function>;
std::map<std::string, u64> &launches = *new std::map<std::string, u64>;

bool is_possible(const Kernel &kernel, const Function &function, Dim grid, Dim block, size_t dynamic_shared) {
    const size_t shared = kernel.dynamic_at() + dynamic_shared;
    const bool asked = shared <= SHARED_UNASKED || dynamic_shared <= function.allowed[current_card()];
    return asked && shared <= static_cast<size_t>(shared_limit()) && grid.size() > 0 && block.size() > 0 &&
           block.size() <= kernel.most_threads && grid.y < 65536 && grid.z < 65536;
}

std::vector<u8> gather(const Kernel &kernel, void **arguments) {
    std::vector<u8> parameters(kernel.parameter_bytes);
    for (size_t i = 0; i < kernel.parameters.size(); i++) {
        memcpy(parameters.data() + kernel.parameters[i].at, arguments[i], kernel.parameters[i].size);
    }
    return parameters;
}

Code launch(const void *host, Dim grid, Dim block, void **arguments, size_t dynamic_shared, void *stream) {
    Function function;
    {
        std::lock_guard<std::mutex> held(lock);
        const auto found = functions.find(host);
        if (found == functions.end()) return INVALID_VALUE;
        function = found->second;
        launches[function.name]++;
    }
    const auto kernel = find_kernel(function.name);
    if (!is_possible(*kernel, function, grid, block, dynamic_shared)) return INVALID_VALUE;
    enqueue(stream, [=, parameters = gather(*kernel, arguments)] {
        run_grid(*kernel, grid, block, dynamic_shared, parameters);
    });
    return SUCCESS;
}

struct Report {
    ~Report() {
        const char *path = setting("EMULATOR_REPORT");
        FILE *file = path != nullptr ? fopen(path, "a") : nullptr;
        if (file == nullptr) return;
        std::lock_guard<std::mutex> held(lock);
        for (const auto &[name, count] : launches) fprintf(file, "%8llu %s\n", (unsigned long long)count, name.c_str());
        fclose(file);
    }
} report;

struct Call {
    Dim grid, block;
    size_t dynamic_shared;
    void *stream;
};
thread_local Call pushed;

}  // namespace

// ------------------------------------------------------------------------------------------------ nvcc's own calls

API void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API void __cudaRegisterFunction(void **, const void *host, char *, const char *name, int, void *, void *, void *,
                                void *, int *) {
    std::lock_guard<std::mutex> held(lock);
    functions[host].name = name;
}
API Code __cudaGetKernel(const void **kernel, const void *host) {
    *kernel = host;
    return SUCCESS;
}
API unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t dynamic_shared, void *stream) {
    pushed = {grid, block, dynamic_shared, stream};
    return 0;
}
API Code __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *dynamic_shared, void **stream) {
    *grid = pushed.grid, *block = pushed.block, *dynamic_shared = pushed.dynamic_shared, *stream = pushed.stream;
    return SUCCESS;
}
API Code __cudaLaunchKernel(const void *kernel, Dim grid, Dim block, void **arguments, size_t dynamic_shared,
                            void *stream) {
    return launch(kernel, grid, block, arguments, dynamic_shared, stream);
}

// ---------------------------------------------------------------------------------------------- our launchers' calls

API Code cudaLaunchKernelExC(const Call *call, const void *host, void **arguments) {
    return launch(host, call->grid, call->block, arguments, call->dynamic_shared, call->stream);
}
API Code cudaGetDevice(int *device) {
    *device = current_card();
    return SUCCESS;
}
API Code cudaDeviceGetAttribute(int *value, int attribute, int) {
    *value = card_attribute(attribute);
    return SUCCESS;
}

struct Attributes {
    size_t static_shared, constants, local;
    int most_threads, registers, ptx, binary;
};
// Few registers: kernels for Hopper alone are empty here, which is how launchers know it.
API Code cudaFuncGetAttributes(Attributes *attributes, const void *) {
    *attributes = {0, 0, 0, 1024, 32, 80, 80};
    return SUCCESS;
}

constexpr int MOST_DYNAMIC_SHARED = 8;
API Code cudaFuncSetAttribute(const void *host, int attribute, int value) {
    if (attribute != MOST_DYNAMIC_SHARED) return SUCCESS;
    if (value > shared_limit()) return INVALID_VALUE;
    std::lock_guard<std::mutex> held(lock);
    functions[host].allowed[current_card()] = value;
    return SUCCESS;
}
API Code cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long, int *) {
    *function = nullptr;
    return INVALID_VALUE;
}
API Code cudaGetLastError() { return SUCCESS; }
API const char *cudaGetErrorString(int) { return "an error of the emulated run time"; }

// ------------------------------------------------------------------------------------------- the emulator's own tests

API int emulator_assemble_all() { return assemble_all(); }
API void emulator_read_ptx(const char *path) { read_ptx(path); }
// A warp of a kernel of two addresses.
API void emulator_launch(const char *name, void *given, void *taken) {
    const auto kernel = find_kernel(name);
    void *arguments[] = {&given, &taken};
    run_grid(*kernel, {1, 1, 1}, {LANES, 1, 1}, 0, gather(*kernel, arguments));
}
