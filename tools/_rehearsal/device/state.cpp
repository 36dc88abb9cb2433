// The device's memory, what was counted, and the functions that Python calls (nullgpu_*; see device.py).
#include "nullgpu.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace nullgpu {
namespace {

struct Region {
    size_t bytes;
    Kind kind;
};

using Key = std::tuple<char, const char *, long, long, long>;

struct State {
    std::recursive_mutex mutex;
    std::map<uintptr_t, Region> regions;
    std::map<uintptr_t, size_t> known;  // device memory that holds what the host last sent there
    std::deque<std::string> answers;    // values for coming reads of device memory, by their size
    std::map<Key, long> counts;
    size_t device = 0, pinned = 0, pinned_peak = 0, occupied = 0;
    double flops = 0;
    bool counting = false;
};

State &state() {  // never destroyed: libraries free memory while the process ends
    static auto *one = new State;
    return *one;
}

size_t &held(Kind kind) { return kind == DEVICE ? state().device : state().pinned; }

std::map<uintptr_t, Region>::iterator region_of(const void *pointer) {
    auto &regions = state().regions;
    auto it = regions.upper_bound((uintptr_t)pointer);
    if (it == regions.begin()) return regions.end();
    --it;
    return (uintptr_t)pointer < it->first + it->second.bytes ? it : regions.end();
}

void add(void *pointer, size_t bytes, Kind kind) {
    state().regions[(uintptr_t)pointer] = {bytes, kind};
    held(kind) += bytes;
    if (state().pinned > state().pinned_peak) state().pinned_peak = state().pinned;
}

bool is_known(const void *pointer, size_t bytes) {
    auto it = state().known.upper_bound((uintptr_t)pointer);
    if (it == state().known.begin()) return false;
    --it;
    return (uintptr_t)pointer + bytes <= it->first + it->second;
}

void unmark(uintptr_t from, size_t bytes) {
    auto &known = state().known;
    auto it = known.lower_bound(from);
    if (it != known.begin() && std::prev(it)->first + std::prev(it)->second > from) --it;
    while (it != known.end() && it->first < from + bytes) it = known.erase(it);
}

void to_host(void *to, const void *from, size_t bytes) {
    auto &answers = state().answers;
    if (!answers.empty() && answers.front().size() == bytes) {
        memcpy(to, answers.front().data(), bytes);
        answers.pop_front();
    } else if (is_known(from, bytes)) {
        memcpy(to, from, bytes);
    } else if (bytes <= COPIED_BYTES) {
        memset(to, 0, bytes);  // a value that a kernel would have computed
    }
}

void onto_device(void *to, const void *from, size_t bytes, bool known) {
    unmark((uintptr_t)to, bytes);
    if (!known || bytes > COPIED_BYTES) return;
    memcpy(to, from, bytes);
    state().known[(uintptr_t)to] = bytes;
}

long setting(const char *name, long otherwise) {
    const char *given = getenv(name);
    return given ? atol(given) : otherwise;
}

thread_local int device = 0;

}  // namespace

void count(char kind, const char *name, long a, long b, long c) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    if (state().counting) state().counts[{kind, name, a, b, c}]++;
}

void count_flops(double flops) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    if (state().counting) state().flops += flops;
}

void *take(size_t bytes, Kind kind) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    bytes = ((bytes ? bytes : 1) + 4095) & ~size_t(4095);
    if (kind == DEVICE && bytes > free_bytes()) return nullptr;
    void *pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pointer == MAP_FAILED) return nullptr;
    add(pointer, bytes, kind);
    return pointer;
}

void drop(void *pointer) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    auto it = state().regions.find((uintptr_t)pointer);
    if (it == state().regions.end()) return;
    Region region = it->second;
    held(region.kind) -= region.bytes;
    if (region.kind == DEVICE) unmark((uintptr_t)pointer, region.bytes);
    if (region.kind != REGISTERED) munmap(pointer, region.bytes);
    state().regions.erase(it);
}

void register_host(void *pointer, size_t bytes) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    add(pointer, bytes, REGISTERED);
}

Kind kind_of(const void *pointer) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    auto it = region_of(pointer);
    return it == state().regions.end() ? UNKNOWN : it->second.kind;
}

uintptr_t base_of(const void *pointer, size_t *bytes) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    auto it = region_of(pointer);
    *bytes = it == state().regions.end() ? 0 : it->second.bytes;
    return *bytes ? it->first : 0;
}

void copy(void *to, const void *from, size_t bytes) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    bool there = kind_of(to) == DEVICE, here = kind_of(from) == DEVICE;
    bool pageable = kind_of(there ? from : to) == UNKNOWN;
    if (here && there) {
        count('C', "within the device", bytes);
        onto_device(to, from, bytes, is_known(from, bytes));
    } else if (here) {
        count('D', "device to host", bytes, pageable);
        to_host(to, from, bytes);
    } else if (there) {
        count('H', "host to device", bytes, pageable);
        onto_device(to, from, bytes, true);
    } else {
        memcpy(to, from, bytes);
    }
}

void forget(const void *pointer) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    unmark((uintptr_t)pointer, 1);
}

size_t capacity() { return setting("NULLGPU_BYTES", 150109880320); }

size_t free_bytes() {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    size_t used = state().device + state().occupied;
    return used < capacity() ? capacity() - used : 0;
}

int device_count() { return setting("NULLGPU_DEVICES", 8); }
int current_device() { return device; }

bool set_device(int to) {
    if (to < 0 || to >= device_count()) return false;
    device = to;
    return true;
}

const char *device_name() {
    const char *name = getenv("NULLGPU_NAME");
    return name ? name : "NVIDIA H200";
}

void *handle() { return calloc(1, 64); }

}  // namespace nullgpu

using nullgpu::state;

API void nullgpu_counting(int on) { state().counting = on; }

API void nullgpu_clear() {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    state().counts.clear();
    state().flops = 0;
    state().pinned_peak = state().pinned;
}

API long nullgpu_bytes(const char *what) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    std::string name(what);
    if (name == "device") return state().device;
    if (name == "pinned") return state().pinned;
    if (name == "pinned_peak") return state().pinned_peak;
    if (name == "occupied") return state().occupied;
    return name == "free" ? (long)nullgpu::free_bytes() : -1;
}

// Memory of other processes on the same device. Returns whether there is room for it.
API int nullgpu_occupy(long bytes) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    if (bytes > 0 && (size_t)bytes > nullgpu::free_bytes()) return 0;
    state().occupied += bytes;
    return 1;
}

// An answer of no bytes takes back those that nothing asked for.
API void nullgpu_answer(const char *value, long bytes) {
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    if (bytes) return (void)state().answers.emplace_back(value, bytes);
    state().answers.clear();
}

API double nullgpu_flops() { return state().flops; }

// Lines of kind, name, a, b, c and their number, separated by tabs; valid until the next call.
API const char *nullgpu_counts() {
    static std::string text;
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    text.clear();
    for (auto &[key, times] : state().counts) {
        auto &[kind, name, a, b, c] = key;
        text += std::string(1, kind) + '\t' + name;
        for (long value : {a, b, c, times}) text += '\t' + std::to_string(value);
        text += '\n';
    }
    return text.c_str();
}
