// Times ggml's CUDA matrix product (MMVQ, MMQ) for packed weights: bench_llama N K M type...
// One line per type: name, microseconds per product, packed GB/s. Weights rotate over 256 MiB, which no L2 holds; their
// bytes are random with finite scales where the type has fp16 ones (0x2c00 pattern), since time does not depend on values.
#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static ggml_type type_named(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * n = ggml_type_name((ggml_type) i);
        if (n && name == n) return (ggml_type) i;
    }
    fprintf(stderr, "no type %s\n", name.c_str());
    exit(1);
}

int main(int argc, char ** argv) {
    const int64_t N = atoll(argv[1]), K = atoll(argv[2]), M = atoll(argv[3]);
    ggml_backend_load_all();
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr);
    if (!backend) { fprintf(stderr, "no GPU backend\n"); return 1; }
    for (int a = 4; a < argc; a++) {
        const ggml_type type = type_named(argv[a]);
        const size_t bytes = ggml_row_size(type, K) * N;
        const int copies = (int) std::max<size_t>(4, ((256u << 20) + bytes - 1) / bytes);
        ggml_init_params params = { ggml_tensor_overhead() * (copies * 3 + 8) + ggml_graph_overhead_custom(4096, false), nullptr, true };
        ggml_context * ctx = ggml_init(params);
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, K, M);
        ggml_cgraph * graph = ggml_new_graph_custom(ctx, 4096, false);
        std::vector<ggml_tensor *> weights;
        for (int c = 0; c < copies; c++) {
            weights.push_back(ggml_new_tensor_2d(ctx, type, K, N));
            ggml_build_forward_expand(graph, ggml_mul_mat(ctx, weights[c], x));
        }
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        std::vector<uint8_t> data(bytes);
        for (size_t i = 0; i + 1 < bytes; i += 2) { data[i] = (uint8_t) (rand() >> 3); data[i + 1] = 0x2c; }
        for (auto * w : weights) ggml_backend_tensor_set(w, data.data(), 0, bytes);
        std::vector<float> ones(K * M, 0.5f);
        ggml_backend_tensor_set(x, ones.data(), 0, ones.size() * sizeof(float));
        if (!ggml_backend_supports_op(backend, graph ? ggml_graph_node(graph, 0) : nullptr)) {
            printf("%s unsupported\n", argv[a]);
        } else {
            for (int i = 0; i < 5; i++) ggml_backend_graph_compute(backend, graph);
            std::vector<double> us;
            for (int i = 0; i < 20; i++) {
                auto start = std::chrono::steady_clock::now();
                ggml_backend_graph_compute(backend, graph);
                us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / copies);
            }
            std::sort(us.begin(), us.end());
            printf("%s N=%lld K=%lld M=%lld %.2f us %.1f GB/s\n", argv[a], (long long) N, (long long) K, (long long) M,
                   us[10], bytes / us[10] / 1e3);
        }
        fflush(stdout);
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }
    return 0;
}
