//! `/v1/agent/host`: what the host is, as Linux tells it.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use crate::clock;

/// `GET /v1/agent/host`: memory, processors, system. What the host does not tell is 0 or empty; disks are not looked at.
pub(super) async fn host(call: Call) -> Result<Reply, Refusal> {
    Reply::json(&call, &read(&read_file("/proc/meminfo"), &read_file("/proc/cpuinfo"), &read_file("/etc/os-release")))
}

fn read(memory: &str, processors: &str, release: &str) -> Value {
    let kib = |name: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let (total, available) = (kib("MemTotal") * 1024, kib("MemAvailable") * 1024);
    let used = total.saturating_sub(available);
    let of_release = |name: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    let models = processors.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let cpus: Vec<Value> = models
        .enumerate()
        .map(|(number, (_, model))| json!({"cpu": number, "modelName": model.trim(), "cores": 1}))
        .collect();
    let uptime = read_file("/proc/uptime").split('.').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0_u64);
    let now = Duration::from_secs(clock::wall().0);
    json!({
        "Memory": {
            "total": total,
            "available": available,
            "used": used,
            "usedPercent": percent(used, total),
            "free": kib("MemFree") * 1024,
        },
        "CPU": cpus,
        "Host": {
            "hostname": read_file("/proc/sys/kernel/hostname").trim(),
            "uptime": uptime,
            "bootTime": now.as_secs().saturating_sub(uptime),
            "os": std::env::consts::OS,
            "platform": of_release("ID"),
            "platformVersion": of_release("VERSION_ID"),
            "kernelVersion": read_file("/proc/sys/kernel/osrelease").trim(),
            "kernelArch": std::env::consts::ARCH,
        },
        "Disk": null,
        "CollectionTime": u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        "Errors": null,
    })
}

/// Parts of a whole, to a tenth; 0 of nothing.
fn percent(part: u64, whole: u64) -> f64 {
    let thousandths = part.saturating_mul(1000).checked_div(whole).unwrap_or(0);
    f64::from(u32::try_from(thousandths).unwrap_or(0)) / 10.0
}

/// Reads a small file of the kernel's or the system's; none is empty.
fn read_file(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_says_is_read_and_what_it_does_not_say_is_nought() {
        let memory = "MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     250 kB\n";
        let read = read(memory, "processor : 0\nmodel name\t: Fast 9000\n", "ID=debian\nVERSION_ID=\"13\"\n");
        assert_eq!(read["Memory"]["used"], 750 * 1024);
        assert_eq!(read["Memory"]["usedPercent"], 75.0);
        assert_eq!(read["CPU"], json!([{"cpu": 0, "modelName": "Fast 9000", "cores": 1}]));
        assert_eq!((&read["Host"]["platform"], &read["Host"]["platformVersion"]), (&json!("debian"), &json!("13")));
        let nothing = super::read("", "", "");
        assert_eq!((&nothing["Memory"]["usedPercent"], &nothing["CPU"]), (&json!(0.0), &json!([])));
    }
}
