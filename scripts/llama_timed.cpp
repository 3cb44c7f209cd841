// Times llama.cpp for bench.py, by its C interface alone: a build of the library is enough.
//
//     llama_timed MODEL.gguf THREADS          takes requests, see below
//     llama_timed MODEL.gguf OUT.gguf F16     writes the model as BF16, F16 or Q4_0
//
// Requests are the lines of standard input; each is answered by one line:
//     prefill N         nanoseconds of a prompt of N tokens, without a prediction at its end
//     decode N DEPTH    nanoseconds of N tokens one by one, after DEPTH tokens
//     greedy N T T ..   the N best tokens after the tokens T, one at a time
//     peak              the most memory the process has had, in KB
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using Tokens = std::vector<llama_token>;

static void fail(const std::string & what) {
    std::cerr << what << "\n";
    std::exit(1);
}

static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The tokens that the other side measures with: spread over the vocabulary, the same every time.
static Tokens some_tokens(int count, uint64_t vocabulary) {
    uint64_t state = 1;
    Tokens tokens;
    for (int i = 0; i < count; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        tokens.push_back((llama_token) ((state >> 33) % vocabulary));
    }
    return tokens;
}

static void compute(llama_context * context, llama_token * tokens, int count) {
    if (llama_decode(context, llama_batch_get_one(tokens, count)) != 0) fail("llama_decode failed");
    llama_synchronize(context);
}

// A prompt goes into the cache without a prediction at its end, as the other side measures it.
static void prefill(llama_context * context, const Tokens & tokens) {
    llama_batch batch = llama_batch_init((int) tokens.size(), 0, 1);
    batch.n_tokens = (int) tokens.size();
    for (int i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 0;
    }
    if (llama_decode(context, batch) != 0) fail("llama_decode failed");
    llama_synchronize(context);
    llama_batch_free(batch);
}

static int quantize(const char * from, const char * to, const std::string & kind) {
    auto params = llama_model_quantize_default_params();
    params.ftype = kind == "Q4_0" ? LLAMA_FTYPE_MOSTLY_Q4_0 : kind == "BF16" ? LLAMA_FTYPE_MOSTLY_BF16 : LLAMA_FTYPE_MOSTLY_F16;
    params.allow_requantize = true;
    params.nthread = 2;
    return (int) llama_model_quantize(from, to, &params);
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
    llama_backend_init();
    if (argc == 4) return quantize(argv[1], argv[2], argv[3]);
    if (argc != 3) fail("llama_timed MODEL.gguf THREADS, or MODEL.gguf OUT.gguf BF16|F16|Q4_0");
    auto * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail("no model");
    auto params = llama_context_default_params();
    params.n_ctx = 512;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = std::atoi(argv[2]);
    auto * context = llama_init_from_model(model, params);
    if (!context) fail("no context");
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::cout << "ready" << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string what;
        int count = 0;
        words >> what >> count;
        llama_memory_clear(llama_get_memory(context), false);
        if (what == "prefill") {
            auto tokens = some_tokens(count, vocabulary);
            const auto start = now_ns();
            prefill(context, tokens);
            std::cout << now_ns() - start << std::endl;
        } else if (what == "decode") {
            int depth = 0;
            words >> depth;
            auto tokens = some_tokens(depth + count, vocabulary);
            if (depth > 0) prefill(context, Tokens(tokens.begin(), tokens.begin() + depth));
            const auto start = now_ns();
            for (int i = 0; i < count; i++) compute(context, &tokens[depth + i], 1);
            std::cout << now_ns() - start << std::endl;
        } else if (what == "greedy") {
            Tokens tokens;
            for (llama_token token; words >> token;) tokens.push_back(token);
            compute(context, tokens.data(), (int) tokens.size());
            for (int i = 0; i < count; i++) {
                const float * logits = llama_get_logits_ith(context, -1);
                llama_token best = (llama_token) (std::max_element(logits, logits + vocabulary) - logits);
                std::cout << best << " ";
                compute(context, &best, 1);
            }
            std::cout << std::endl;
        } else if (what == "peak") {
            std::ifstream status("/proc/self/status");
            std::string text, peak = "0";
            while (std::getline(status, text)) {
                if (text.rfind("VmHWM:", 0) == 0) peak = text.substr(6, text.size() - 9);
            }
            std::cout << peak << std::endl;
        } else {
            fail("unknown: " + line);
        }
    }
}
