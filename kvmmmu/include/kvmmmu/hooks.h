/* SPDX-License-Identifier: Apache-2.0 */
/* Points where test builds stop a thread or plant a fault; nothing in a release. */
#ifndef KVMMMU_HOOKS_H
#define KVMMMU_HOOKS_H

#ifdef KVMMMU_TEST
void kvmmmu_test_yield(void *vcpu, int point);
int kvmmmu_test_mutant(void *vm, int id);
#define KVMMMU_YIELD(vcpu, point) kvmmmu_test_yield((vcpu), (point))
#define KVMMMU_MUTANT(vm, id) kvmmmu_test_mutant((vm), (id))
#else
#define KVMMMU_YIELD(vcpu, point) ((void)0)
#define KVMMMU_MUTANT(vm, id) 0
#endif

#endif
