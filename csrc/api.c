/* api.c - the entry points: check, lay out the workspace, run. */
#include "internal.h"

static void pass_over(pnn_pass pass, const pnn_problem *problem, const pnn_host *host, pnn_arena *arena, bool run) {
  (pass == PNN_PASS_FORWARD ? pnn_forward_pass : pnn_backward_pass)(problem, host, arena, run);
}

static pnn_status laid_out(const pnn_arena *arena, const pnn_problem *problem, const pnn_host *host, pnn_error *error) {
  PNN_FAIL_IF(arena->overflow, error, PNN_ERROR_OVERFLOW,
              "the workspace for %lld outputs, %lld response maps and %d threads exceeds what can be addressed",
              (long long)problem->outputs, (long long)problem->maps, host ? (int)host->threads : 1);
  return PNN_OK;
}

pnn_status pnn_workspace_size(const pnn_params *params, pnn_pass pass, const pnn_host *host, size_t *bytes,
                              pnn_error *error) {
  pnn_problem problem;
  PNN_FAIL_IF(!bytes, error, PNN_ERROR_NULL, "bytes is NULL, it should point to a size_t");
  *bytes = 0;
  PNN_FORWARD_IF(pnn_check(params, pass, host, &problem, error));
  pnn_arena arena = pnn_arena_make(NULL, 0);
  pass_over(pass, &problem, host, &arena, false);
  PNN_FORWARD_IF(laid_out(&arena, &problem, host, error));
  *bytes = pnn_arena_bytes(&arena);
  return pnn_succeed(error);
}

static pnn_status run(const pnn_params *params, pnn_pass pass, const pnn_host *host, pnn_error *error) {
  pnn_problem problem;
  PNN_FORWARD_IF(pnn_check(params, pass, host, &problem, error));
  pnn_recipe_read(&problem);
  pnn_arena arena = pnn_arena_make(params->workspace, params->workspace_bytes);
  const pnn_fpenv environment = pnn_fpenv_enter();
  pass_over(pass, &problem, host, &arena, true);
  pnn_fpenv_leave(environment);
  /* Where one of these fails, the pass has not run. */
  PNN_FORWARD_IF(laid_out(&arena, &problem, host, error));
  PNN_FORWARD_IF(pnn_arena_check(&arena, params, "pnn_workspace_size", error));
  return pnn_succeed(error);
}

pnn_status pnn_forward(const pnn_params *params, const pnn_host *host, pnn_error *error) {
  return run(params, PNN_PASS_FORWARD, host, error);
}

pnn_status pnn_backward(const pnn_params *params, const pnn_host *host, pnn_error *error) {
  return run(params, PNN_PASS_BACKWARD, host, error);
}
