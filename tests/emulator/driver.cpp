// What the driver answers. Everything is done when it is asked for, by the thread that asks; streams only record.
#include "driver.h"

#include <stdio.h>
#include <string.h>

#include <atomic>
#include <mutex>

#include "memory.h"
#include "settings.h"

namespace {

constexpr int MOST_CARDS = 8;
constexpr size_t CARD_BYTES = size_t(4) << 30;

struct Card {
    std::atomic<size_t> taken{0};
};
Card cards[MOST_CARDS];  // a context is its card
thread_local Card *current;

// Which card an allocation is of, and how large.
struct Owned {
    Card *card;
    size_t size;
};
std::mutex &lock = *new std::mutex;
std::map<void *, Owned> &owned = *new std::map<void *, Owned>;

typedef std::vector<std::function<void()>> Graph;
struct Stream {
    Graph *recorded = nullptr;
};

Code allocate_on_card(void **p, size_t size) {
    Card &card = cards[current_card()];
    if (card.taken + size > CARD_BYTES || (*p = allocate(size)) == nullptr) return OUT_OF_MEMORY;
    std::lock_guard<std::mutex> held(lock);
    owned[*p] = {&card, size};
    card.taken += size;
    return SUCCESS;
}

Code free_on_card(void *p) {
    if (p == nullptr) return SUCCESS;
    {
        std::lock_guard<std::mutex> held(lock);
        const auto found = owned.find(p);
        if (found == owned.end()) return INVALID_VALUE;
        found->second.card->taken -= found->second.size;
        owned.erase(found);
    }
    release(p);
    return SUCCESS;
}

Code copy(void *to, const void *from, size_t size, void *stream) {
    enqueue(stream, [=] { memcpy(to, from, size); });
    return SUCCESS;
}

template <class T>
Code fill(T *to, T value, size_t count, void *stream) {
    enqueue(stream, [=] { std::fill(to, to + count, value); });
    return SUCCESS;
}

}  // namespace

int current_card() { return current != nullptr ? current - cards : 0; }

int card_attribute(int attribute) {
    switch (attribute) {
        case 8: return SHARED_UNASKED;
        case 10: return LANES;
        case 16: return 8;  // multiprocessors
        case 75: return 8;   // the compute capability of the PTX, 8.0
        case 76: return 0;
        case 97: return shared_limit();
        case 115: return 1;  // pools of memory
        default: fail(nullptr, nullptr, "attribute %d of a device", attribute);
    }
}

void enqueue(void *stream, std::function<void()> work) {
    Graph *recorded = stream != nullptr ? static_cast<Stream *>(stream)->recorded : nullptr;
    if (recorded != nullptr) return recorded->push_back(std::move(work));
    work();
}

// ----------------------------------------------------------------------------------------------- cards and contexts

API Code cuInit(unsigned) { return SUCCESS; }
API Code cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}
API Code cuDeviceGetCount(int *count) {
    *count = std::min(num_cards(), MOST_CARDS);
    return SUCCESS;
}
API Code cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < num_cards() ? SUCCESS : INVALID_DEVICE;
}
API Code cuDeviceGetName(char *name, int size, int) {
    snprintf(name, size, "emulated card");
    return SUCCESS;
}
API Code cuDeviceGetUuid_v2(char *id, int device) {
    memset(id, device + 1, 16);
    return SUCCESS;
}
API Code cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = card_attribute(attribute);
    return SUCCESS;
}
API Code cuDeviceCanAccessPeer(int *can, int, int) {
    *can = 1;
    return SUCCESS;
}
API Code cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &cards[device];
    return SUCCESS;
}
API Code cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Code cuCtxSetCurrent(void *context) {
    current = static_cast<Card *>(context);
    return SUCCESS;
}
API Code cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}
API Code cuCtxEnablePeerAccess(void *, unsigned) { return SUCCESS; }
API Code cuGetErrorName(Code code, const char **name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE";
    return SUCCESS;
}
API Code cuGetErrorString(Code code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "an error of the emulated driver";
    return SUCCESS;
}

// ----------------------------------------------------------------------------------------------------------- memory

API Code cuMemAlloc_v2(void **p, size_t size) { return allocate_on_card(p, size); }
API Code cuMemAllocAsync(void **p, size_t size, void *) { return allocate_on_card(p, size); }
API Code cuMemFree_v2(void *p) { return free_on_card(p); }
API Code cuMemFreeAsync(void *p, void *) { return free_on_card(p); }
API Code cuMemHostAlloc(void **p, size_t size, unsigned) {
    *p = allocate(size);
    return *p != nullptr ? SUCCESS : OUT_OF_MEMORY;
}
API Code cuMemFreeHost(void *p) { return release(p) ? SUCCESS : INVALID_VALUE; }
API Code cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = CARD_BYTES, *free = CARD_BYTES - cards[current_card()].taken;
    return SUCCESS;
}
API Code cuIpcGetMemHandle(void *, void *) { return NOT_SUPPORTED; }

API Code cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t size, void *stream) {
    return copy(to, from, size, stream);
}
API Code cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t size, void *stream) {
    return copy(to, from, size, stream);
}
API Code cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t size, void *stream) {
    return copy(to, from, size, stream);
}

struct Corner {
    size_t x, y;
    int type;
    char *host, *device;  // `host` where the type is 1
    void *array;
    size_t pitch;
    char *start() const { return (type == 1 ? host : device) + y * pitch + x; }
};
struct Copy2D {
    Corner from, to;
    size_t width, height;
};
API Code cuMemcpy2DAsync_v2(const Copy2D *asked, void *stream) {
    enqueue(stream, [c = *asked] {
        for (size_t i = 0; i < c.height; i++) {
            memcpy(c.to.start() + i * c.to.pitch, c.from.start() + i * c.from.pitch, c.width);
        }
    });
    return SUCCESS;
}
API Code cuMemsetD8Async(u8 *to, u8 value, size_t count, void *stream) { return fill(to, value, count, stream); }
API Code cuMemsetD16Async(u16 *to, u16 value, size_t count, void *stream) { return fill(to, value, count, stream); }
API Code cuMemsetD32Async(u32 *to, u32 value, size_t count, void *stream) { return fill(to, value, count, stream); }

// ------------------------------------------------------------------------------------------------ streams and events

API Code cuStreamCreate(void **stream, unsigned) {
    *stream = new Stream;
    return SUCCESS;
}
API Code cuStreamDestroy_v2(void *stream) {
    delete static_cast<Stream *>(stream);
    return SUCCESS;
}
API Code cuStreamSynchronize(void *) { return SUCCESS; }
API Code cuStreamWaitEvent(void *, void *, unsigned) { return SUCCESS; }
API Code cuEventCreate(void **event, unsigned) {
    *event = new char;
    return SUCCESS;
}
API Code cuEventDestroy_v2(void *event) {
    delete static_cast<char *>(event);
    return SUCCESS;
}
API Code cuEventRecord(void *, void *) { return SUCCESS; }
API Code cuEventSynchronize(void *) { return SUCCESS; }

API Code cuStreamBeginCapture_v2(void *stream, int) {
    static_cast<Stream *>(stream)->recorded = new Graph;
    return SUCCESS;
}
API Code cuStreamEndCapture(void *stream, void **graph) {
    *graph = static_cast<Stream *>(stream)->recorded;
    static_cast<Stream *>(stream)->recorded = nullptr;
    return SUCCESS;
}
API Code cuStreamIsCapturing(void *stream, int *is) {
    *is = stream != nullptr && static_cast<Stream *>(stream)->recorded != nullptr;
    return SUCCESS;
}
API Code cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph *>(graph));
    return SUCCESS;
}
API Code cuGraphLaunch(void *executable, void *) {
    for (const std::function<void()> &work : *static_cast<Graph *>(executable)) work();
    return SUCCESS;
}
API Code cuGraphGetNodes(void *graph, void *, size_t *count) {
    *count = static_cast<Graph *>(graph)->size();
    return SUCCESS;
}
API Code cuGraphDestroy(void *graph) {
    delete static_cast<Graph *>(graph);
    return SUCCESS;
}
API Code cuGraphExecDestroy(void *executable) { return cuGraphDestroy(executable); }
