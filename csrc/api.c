/* api.c - the entry points: check, measure the workspace, run. */
#include "internal.h"

static pnn_status layout(const pnn_params *params, pnn_pass pass, const pnn_host *host, pnn_problem *problem,
                         size_t *bytes, pnn_error *error) {
  PNN_FORWARD_IF(pnn_check(params, pass, host, problem, error));
  pnn_arena arena = pnn_arena_make(NULL);
  (pass == PNN_PASS_FORWARD ? pnn_forward_pass : pnn_backward_pass)(problem, host, &arena, false);
  PNN_FAIL_IF(arena.overflow, error, PNN_ERROR_OVERFLOW,
              "the workspace for %lld outputs, %lld response maps and %d threads exceeds what can be addressed",
              (long long)problem->outputs, (long long)problem->maps, host ? (int)host->threads : 1);
  *bytes = pnn_arena_bytes(&arena);
  return PNN_OK;
}

pnn_status pnn_workspace_size(const pnn_params *params, pnn_pass pass, const pnn_host *host, size_t *bytes,
                              pnn_error *error) {
  pnn_problem problem;
  PNN_FAIL_IF(!bytes, error, PNN_ERROR_NULL, "bytes is NULL, it should point to a size_t");
  *bytes = 0;
  PNN_FORWARD_IF(layout(params, pass, host, &problem, bytes, error));
  return pnn_succeed(error);
}

static pnn_status run(const pnn_params *params, pnn_pass pass, const pnn_host *host, pnn_error *error) {
  pnn_problem problem;
  size_t bytes = 0;
  PNN_FORWARD_IF(layout(params, pass, host, &problem, &bytes, error));
  PNN_FAIL_IF(bytes && !params->workspace, error, PNN_ERROR_NULL,
              "workspace is NULL, it should point to %zu bytes: ask pnn_workspace_size", bytes);
  PNN_FAIL_IF(bytes > params->workspace_bytes, error, PNN_ERROR_WORKSPACE,
              "workspace_bytes is %zu, it should be at least %zu: ask pnn_workspace_size", params->workspace_bytes,
              bytes);
  pnn_recipe_read(&problem);
  const pnn_fpenv environment = pnn_fpenv_enter();
  pnn_arena arena = pnn_arena_make(params->workspace);
  (pass == PNN_PASS_FORWARD ? pnn_forward_pass : pnn_backward_pass)(&problem, host, &arena, true);
  pnn_fpenv_leave(environment);
  return pnn_succeed(error);
}

pnn_status pnn_forward(const pnn_params *params, const pnn_host *host, pnn_error *error) {
  return run(params, PNN_PASS_FORWARD, host, error);
}

pnn_status pnn_backward(const pnn_params *params, const pnn_host *host, pnn_error *error) {
  return run(params, PNN_PASS_BACKWARD, host, error);
}
