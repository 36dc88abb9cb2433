// Broadcasts that never end, as NCCL's do when another member has died: the stream, every event recorded on it, and
// every stream that waits for such an event stay busy until a communicator is aborted.
#include <mutex>
#include <set>

#include "nullgpu.h"

namespace {

std::mutex mutex;
bool hanging = false;

std::set<const void *> &busy() {  // streams and events
    static auto *handles = new std::set<const void *>;
    return *handles;
}

void follow(const void *handle, const void *other) {
    std::lock_guard<std::mutex> lock(mutex);
    if (busy().count(other)) busy().insert(handle);
}

cudaError_t query(const void *handle) {
    std::lock_guard<std::mutex> lock(mutex);
    return busy().count(handle) ? cudaErrorNotReady : cudaSuccess;
}

}  // namespace

void nullgpu::broadcast_on(const void *stream) {
    std::lock_guard<std::mutex> lock(mutex);
    if (hanging) busy().insert(stream);
}

API void nullgpu_hang(int on) { hanging = on; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        busy().erase(event);
    }
    return follow(event, stream), cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return follow(stream, event), cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return query(event); }
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return query(stream); }
API int ncclCommAbort(void *) {
    std::lock_guard<std::mutex> lock(mutex);
    nullgpu::count('N', "Abort");
    return busy().clear(), 0;
}
