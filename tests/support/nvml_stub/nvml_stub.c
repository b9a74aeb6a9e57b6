/*
 * A libnvidia-ml.so.1 that plays a scenario from the text file named by NVML_STUB, so that detection can be tested
 * through the real bindings. Compiled by support/fake_driver.py.
 *
 * One "key=value" a line. "gpu" opens a GPU, "slice" a MIG device of it; before the first "gpu" the keys are global.
 *   driver=570.86.10            global
 *   name= uuid= total= reserved= used= (MiB)  cc=9.0  ecc=0|1  mig=0|1  gi= ci=  process=PID:MIB
 *   fail=FUNCTION:CODE   hang=FUNCTION   crash=FUNCTION   of the device, or global
 * With -DOLD_DRIVER the functions that came with driver 510 are not there.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MIB (1024ULL * 1024ULL)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, VERSION_MISMATCH = 25 };

typedef struct {
    char name[96], uuid[96];
    unsigned long long total, reserved, used;
    int major, minor, ecc, mig, gi, ci, parent;
    unsigned pid;
    unsigned long long pid_bytes;
} Device;

typedef struct {
    char function[64];
    int device, code;
} Event;

typedef struct {
    unsigned long long total, free, used;
} Memory;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} Memory2;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gi, ci;
} Process;

static Device devices[64];
static Event events[64];
static int device_count, event_count, loaded;
static char driver[64] = "570.86.10";

enum { HANG = -1, CRASH = -2 };

static void add_event(const char *value, int code) {
    Event *event = &events[event_count++];
    sscanf(value, "%63[^:]:%d", event->function, &code);
    event->device = device_count - 1;
    event->code = code;
}

static void set(const char *key, const char *value) {
    Device *device = device_count ? &devices[device_count - 1] : NULL;
    if (!strcmp(key, "driver")) snprintf(driver, sizeof driver, "%s", value);
    else if (!strcmp(key, "fail")) add_event(value, 999);
    else if (!strcmp(key, "hang")) add_event(value, HANG);
    else if (!strcmp(key, "crash")) add_event(value, CRASH);
    else if (!device) abort();
    else if (!strcmp(key, "name")) snprintf(device->name, sizeof device->name, "%s", value);
    else if (!strcmp(key, "uuid")) snprintf(device->uuid, sizeof device->uuid, "%s", value);
    else if (!strcmp(key, "total")) device->total = strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "reserved")) device->reserved = strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "used")) device->used = strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "cc")) sscanf(value, "%d.%d", &device->major, &device->minor);
    else if (!strcmp(key, "ecc")) device->ecc = atoi(value);
    else if (!strcmp(key, "mig")) device->mig = atoi(value);
    else if (!strcmp(key, "gi")) device->gi = atoi(value);
    else if (!strcmp(key, "ci")) device->ci = atoi(value);
    else if (!strcmp(key, "process")) {
        unsigned long long mib = 0;
        sscanf(value, "%u:%llu", &device->pid, &mib);
        device->pid_bytes = mib * MIB;
    } else abort();
}

static void open_device(int is_slice) {
    static int last_gpu;
    Device *device = &devices[device_count];
    if (!is_slice) last_gpu = device_count;
    *device = (Device){.ecc = -1, .mig = -1, .parent = is_slice ? last_gpu : -1, .major = 9};
    device_count++;
}

static void load(void) {
    char line[256];
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (loaded++ || !file) return;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *equals = strchr(line, '=');
        if (!strcmp(line, "gpu")) open_device(0);
        else if (!strcmp(line, "slice")) open_device(1);
        else if (equals) {
            *equals = 0;
            set(line, equals + 1);
        }
    }
    fclose(file);
}

static int begin(const char *function, const Device *device) {
    load();
    for (int i = 0; i < event_count; i++) {
        const Event *event = &events[i];
        if (strcmp(event->function, function)) continue;
        if (event->device >= 0 && (!device || device != &devices[event->device])) continue;
        if (event->code == HANG) for (;;) pause();
        if (event->code == CRASH) raise(SIGSEGV);
        return event->code;
    }
    return SUCCESS;
}

#define BEGIN(device) do { int code_ = begin(__func__, device); if (code_) return code_; } while (0)

static Device *nth(int parent, unsigned index) {
    for (int i = 0; i < device_count; i++)
        if (devices[i].parent == parent && index-- == 0) return &devices[i];
    return NULL;
}

static unsigned number_of(int parent) {
    unsigned count = 0;
    while (nth(parent, count)) count++;
    return count;
}

static int text(char *out, unsigned size, const char *value) {
    if (strlen(value) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; BEGIN(NULL); return SUCCESS; }
int nvmlInit_v2(void) { BEGIN(NULL); return SUCCESS; }
int nvmlShutdown(void) { BEGIN(NULL); return SUCCESS; }

const char *nvmlErrorString(int code) {
    static char words[64];
    snprintf(words, sizeof words, "stub error %d", code);
    return words;
}

int nvmlSystemGetDriverVersion(char *out, unsigned size) { BEGIN(NULL); return text(out, size, driver); }

int nvmlDeviceGetCount_v2(unsigned *count) { BEGIN(NULL); *count = number_of(-1); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    load();
    *device = nth(-1, index);
    BEGIN(*device);
    return *device ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetName(Device *device, char *out, unsigned size) { BEGIN(device); return text(out, size, device->name); }
int nvmlDeviceGetUUID(Device *device, char *out, unsigned size) { BEGIN(device); return text(out, size, device->uuid); }

int nvmlDeviceGetMemoryInfo(Device *device, Memory *out) {
    BEGIN(device);
    out->total = device->total;
    out->used = device->used + device->reserved;
    out->free = device->total - out->used;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    BEGIN(device);
    *major = device->major;
    *minor = device->minor;
    return SUCCESS;
}

int nvmlDeviceGetEccMode(Device *device, int *current, int *pending) {
    BEGIN(device);
    *current = *pending = device->ecc;
    return device->ecc < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    BEGIN(device);
    *current = *pending = (unsigned)device->mig;
    return device->mig < 0 ? NOT_SUPPORTED : SUCCESS;
}

/* As on a real GPU: room for seven, of which the first ones need not exist. */
int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) { BEGIN(device); *count = 7; return SUCCESS; }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **slice) {
    BEGIN(device);
    *slice = index ? nth((int)(device - devices), index - 1) : NULL;
    return *slice ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetGpuInstanceId(Device *device, unsigned *id) { BEGIN(device); *id = (unsigned)device->gi; return SUCCESS; }
int nvmlDeviceGetComputeInstanceId(Device *device, unsigned *id) { BEGIN(device); *id = (unsigned)device->ci; return SUCCESS; }

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory2 *out) {
    BEGIN(device);
    if (out->version != (sizeof(Memory2) | 2U << 24)) return VERSION_MISMATCH;
    out->total = device->total;
    out->reserved = device->reserved;
    out->used = device->used;
    out->free = device->total - device->reserved - device->used;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *out) {
    BEGIN(device);
    unsigned room = *count;
    *count = device->pid ? 1 : 0;
    if (room < *count) return INSUFFICIENT_SIZE;
    if (*count) out[0] = (Process){.pid = device->pid, .used = device->pid_bytes, .gi = ~0U, .ci = ~0U};
    return SUCCESS;
}
#endif
