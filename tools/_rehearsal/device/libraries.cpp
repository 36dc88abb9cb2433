// cuBLAS and cuBLASLt, whose products are counted with their FLOPs, and NCCL, whose collectives are counted by size.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "nullgpu.h"

using namespace nullgpu;

namespace {

int product(const char *name, long m, long n, long k, long batch = 1) {
    count('K', name);
    count('G', name, m * batch, n, k);
    count_flops(2.0 * m * n * k * batch);
    return 0;
}

// Of cuBLASLt's opaque descriptors: what a product's size is read from.
struct Matrix {
    uint64_t rows, columns;
    int type, batch;
};
struct Product {
    int transposed;
};
constexpr int TRANSPOSE_A = 3, BATCH_COUNT = 5, E4M3 = 28, E5M2 = 29;

void fill(void *place, int type, uint64_t rows, uint64_t columns) { *(Matrix *)place = {rows, columns, type, 1}; }

}  // namespace

API int cublasCreate_v2(void **made) { return *made = handle(), 0; }
API int cublasLtCreate(void **made) { return *made = handle(), 0; }
API int cublasGetVersion_v2(void *, int *version) { return *version = 130100, 0; }
API size_t cublasLtGetVersion() { return 130100; }
API size_t cublasGetCudartVersion() { return 13000; }
API size_t cublasLtGetCudartVersion() { return 13000; }
API const char *cublasGetStatusString(int) { return "an error of the null GPU"; }
API int cublasGetMathMode(void *, int *mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void *, int *mode) { return *mode = 0; }
API int cublasGemmEx(void *, int, int, int m, int n, int k, ...) { return product("cublasGemmEx", m, n, k); }
API int cublasSgemm_v2(void *, int, int, int m, int n, int k, ...) { return product("cublasSgemm", m, n, k); }
API int cublasGemmStridedBatchedEx(void *, int, int, int m, int n, int k, const void *, const void *, int, int,
                                   long long, const void *, int, int, long long, const void *, void *, int, int,
                                   long long, int batch, ...) {
    return product("cublasGemmStridedBatchedEx", m, n, k, batch);
}
API int cublasSgemmStridedBatched(void *, int, int, int m, int n, int k, const float *, const float *, int, long long,
                                  const float *, int, long long, const float *, float *, int, long long, int batch) {
    return product("cublasSgemmStridedBatched", m, n, k, batch);
}
API int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t) {
    *made = handle();
    return fill(*made, type, rows, columns), 0;
}
API int cublasLtMatrixLayoutInit_internal(void *place, size_t, int type, uint64_t rows, uint64_t columns, int64_t) {
    return fill(place, type, rows, columns), 0;
}
API int cublasLtMatrixLayoutDestroy(void *made) { return free(made), 0; }
API int cublasLtMatrixLayoutSetAttribute(void *layout, int which, const void *value, size_t) {
    if (which == BATCH_COUNT) ((Matrix *)layout)->batch = *(const int *)value;
    return 0;
}
API int cublasLtMatmulDescCreate(void **made, int, int) { return *made = handle(), 0; }
API int cublasLtMatmulDescDestroy(void *made) { return free(made), 0; }
API int cublasLtMatmulDescSetAttribute(void *described, int which, const void *value, size_t) {
    if (which == TRANSPOSE_A) ((Product *)described)->transposed = *(const int *)value;
    return 0;
}
API int cublasLtMatmulPreferenceCreate(void **made) { return *made = handle(), 0; }
API int cublasLtMatmulPreferenceDestroy(void *made) { return free(made), 0; }
API int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, char *results,
                                       int *found) {
    memset(results, 0, 88);  // one cublasLtMatmulHeuristicResult_t: an algorithm, no workspace, success
    return *found = 1, 0;
}
API int cublasLtMatmul(void *, Product *described, const void *, const void *, Matrix *a, const void *, void *,
                       const void *, const void *, void *, void *, Matrix *d, ...) {
    bool fp8 = a->type == E4M3 || a->type == E5M2;
    long k = described->transposed ? a->rows : a->columns;
    return product(fp8 ? "cublasLtMatmul, FP8" : "cublasLtMatmul", d->rows, d->columns, k, d->batch);
}

// ------------------------------------------------------------------------------------------------ NCCL
namespace {

struct Communicator {
    int ranks, rank;
    long number;
};
// Sends and receives between ncclGroupStart and ncclGroupEnd, by communicator.
struct Exchange {
    long sends = 0, sent = 0, receives = 0, received = 0;
    bool to_itself = false;
};
thread_local int depth = 0;
thread_local std::map<Communicator *, Exchange> exchanges;

struct Id {
    char bytes[128];
};

std::string joined;  // lines of a communicator's number and its id

int join(void **made, int ranks, const Id &id, int rank) {
    static long number = 0;
    *made = new Communicator{ranks, rank, ++number};
    joined += std::to_string(number) + '\t' + std::string(id.bytes, strnlen(id.bytes, sizeof id.bytes)) + '\n';
    return 0;
}

// By ncclDataType_t: int8, uint8, int32, uint32, int64, uint64, float16, float32, float64, bfloat16, two of float8.
long size_of(int type) {
    static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return sizes[type];
}

int collective(const char *name, size_t values, int type, void *group, const void *from, void *to) {
    if ((from && kind_of(from) != DEVICE) || (to && kind_of(to) != DEVICE)) name = "memory that is not the device's";
    auto *communicator = (Communicator *)group;
    count('N', name, values * size_of(type), communicator->number, communicator->ranks);
    if (to) forget(to);
    return 0;
}

// Only an all-to-all sends to its own rank: pipeline stages do not.
void finish(Communicator *group, const Exchange &exchange) {
    if (exchange.to_itself) return count('N', "AllToAll", exchange.sent, group->number, group->ranks);
    if (exchange.sends) count('N', "Send", exchange.sent, group->number, group->ranks);
    if (exchange.receives) count('N', "Recv", exchange.received, group->number, group->ranks);
}

}  // namespace

API const char *nullgpu_communicators() { return joined.c_str(); }
API int ncclGetVersion(int *version) { return *version = 22907, 0; }
API int ncclGetUniqueId(Id *id) {
    static int made = 0;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "id %d", ++made);
    return 0;
}
API int ncclCommInitRank(void **made, int ranks, Id id, int rank) { return join(made, ranks, id, rank); }
API int ncclCommInitRankConfig(void **made, int ranks, Id id, int rank, void *) { return join(made, ranks, id, rank); }
API int ncclCommInitRankScalable(void **made, int ranks, int rank, int, Id *ids, void *) {
    return join(made, ranks, ids[0], rank);
}
API int ncclCommCount(void *group, int *ranks) { return *ranks = ((Communicator *)group)->ranks, 0; }
API int ncclCommUserRank(void *group, int *rank) { return *rank = ((Communicator *)group)->rank, 0; }
API int ncclCommCuDevice(void *, int *device) { return *device = current_device(), 0; }
API int ncclCommGetAsyncError(void *, int *error) { return *error = 0; }
API const char *ncclGetErrorString(int) { return "an error of the null GPU"; }
API const char *ncclGetLastError(void *) { return ""; }
API int ncclMemAlloc(void **pointer, size_t bytes) { return (*pointer = take(bytes, DEVICE)) ? 0 : 1; }
API int ncclMemFree(void *pointer) { return drop(pointer), 0; }
API int ncclAllReduce(const void *from, void *to, size_t n, int type, int, void *group, void *) {
    return collective("AllReduce", n, type, group, from, to);
}
API int ncclAllGather(const void *from, void *to, size_t n, int type, void *group, void *) {
    return collective("AllGather", n, type, group, from, to);
}
API int ncclReduceScatter(const void *from, void *to, size_t n, int type, int, void *group, void *) {
    return collective("ReduceScatter", n, type, group, from, to);
}
API int ncclBroadcast(const void *from, void *to, size_t n, int type, int, void *group, void *stream) {
    broadcast_on(stream);
    return collective("Broadcast", n, type, group, from, to);
}
API int ncclBcast(void *both, size_t n, int type, int, void *group, void *stream) {
    broadcast_on(stream);
    return collective("Broadcast", n, type, group, both, both);
}
API int ncclReduce(const void *from, void *to, size_t n, int type, int, int, void *group, void *) {
    return collective("Reduce", n, type, group, from, to);
}
API int ncclAlltoAll(const void *from, void *to, size_t n, int type, void *group, void *) {
    return collective("AllToAll", n * ((Communicator *)group)->ranks, type, group, from, to);
}
API int ncclGroupStart() { return depth++, 0; }
API int ncclGroupEnd() {
    if (--depth == 0) {
        for (auto &[group, exchange] : exchanges) finish(group, exchange);
        exchanges.clear();
    }
    return 0;
}
API int ncclSend(const void *from, size_t n, int type, int peer, void *group, void *) {
    if (!depth) return collective("Send", n, type, group, from, nullptr);
    Exchange &exchange = exchanges[(Communicator *)group];
    exchange.sends++, exchange.sent += n * size_of(type);
    exchange.to_itself |= peer == ((Communicator *)group)->rank;
    return 0;
}
API int ncclRecv(void *to, size_t n, int type, int, void *group, void *) {
    if (!depth) return collective("Recv", n, type, group, nullptr, to);
    Exchange &exchange = exchanges[(Communicator *)group];
    exchange.receives++, exchange.received += n * size_of(type);
    return forget(to), 0;
}
