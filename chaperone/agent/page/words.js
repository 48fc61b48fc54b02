// A status in words. Whatever a program or a person wrote goes through `visible`, and into text
// nodes only.

const FINAL = new Set(["terminated", "error", "lost"]);
const isFinal = (status) => FINAL.has(status.state);
const hasFailed = (status) => isFinal(status) && status.return_code !== 0;

// Control characters and those that turn the direction of text, made visible: as escapes, because
// a font may lack the symbols that Unicode has for them.
const HIDDEN =
  /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;
const visible = (text) =>
  String(text).replace(HIDDEN, (char) => {
    const code = char.charCodeAt(0);
    const digits = code.toString(16);
    return code < 0x100 ? `\\x${digits.padStart(2, "0")}` : `\\u${digits.padStart(4, "0")}`;
  });

function tone(status) {
  if (status.state === "terminated") return status.return_code === 0 ? "good" : "bad";
  return (
    { error: "bad", lost: "bad", stopping: "warn", unattended: "warn" }[status.state] ?? "busy"
  );
}

function outcome(status) {
  if (status.state === "terminated") {
    const how =
      status.return_code === null ? (status.signal ?? "unknown") : `exit ${status.return_code}`;
    return status.stop ? `${how} (${status.stop.reason})` : how;
  }
  return FINAL.has(status.state) ? (status.exception?.stage ?? "unknown") : "";
}

const STOPPED_FOR = {
  request: "it was asked to stop",
  timeout: "it ran longer than its time-out",
  idle: "it wrote nothing for too long",
  lease: "its lease was over",
  disconnect: "its connection was cut",
  output: "it wrote more than its limit",
  guard: "its guard was killed",
};

function stopped(stop) {
  const by = stop.by ? ` by ${visible(stop.by)}` : "";
  const why =
    stop.reason === "request"
      ? `A stop was requested${by}`
      : `Stopped${by}: ${STOPPED_FOR[stop.reason] ?? visible(stop.reason)}`;
  return `${why}${stop.time ? ` at ${clock(stop.time)}` : ""}.`;
}

const reasonOf = (what) => (what?.message ? `: ${visible(what.message)}` : "");

// How the run is, or how it ended: sentences for a person at night.
function sentences(status) {
  const said = [];
  const reason = reasonOf(status.exception);
  if (status.state === "terminated") {
    if (status.return_code === 0) said.push("Ended well, with exit code 0.");
    else if (status.return_code !== null) said.push(`Failed with exit code ${status.return_code}.`);
    else {
      said.push(
        `Ended by signal ${visible(status.signal)}${status.core_dump ? ", with a core dump" : ""}.`,
      );
    }
    if (status.oom) {
      said.push(
        "The kernel counted an out-of-memory kill in its cgroup: it probably ran out of memory.",
      );
    } else if (status.signal === "SIGKILL" && !status.stop) {
      said.push(
        status.oom === false
          ? "No stop was requested, and the kernel counted no out-of-memory kill."
          : "No stop was requested.",
      );
    }
  } else if (status.state === "error") {
    said.push(`Could not be run${reason}.`);
  } else if (status.state === "lost") {
    said.push(`Lost: its outcome can't be known${reason}.`);
    if (status.gone_by) said.push(`It is certainly dead by ${clock(status.gone_by)}.`);
  } else if (status.state === "unattended") {
    said.push("Its chaperone died; the program may still be running.");
  } else if (status.connection?.state === "queued") {
    said.push(`Waiting in a queue${reasonOf(status.connection)}.`);
  } else {
    said.push(
      { starting: "Starting.", running: "Running.", stopping: "Stopping." }[status.state] ??
        `${visible(status.state)}.`,
    );
    if (status.connection?.state === "down") said.push("Its connection is down.");
  }
  if (status.stop) said.push(stopped(status.stop));
  if (isFinal(status) && status.leftovers) {
    said.push(`It left ${status.leftovers} processes running.`);
  }
  if (status.state === "terminated" && !status.complete) {
    said.push("The end of its output may be missing.");
  }
  for (const stream of ["stdout", "stderr"]) {
    if (status[stream]?.dropped) {
      said.push(`${amount(status[stream].dropped)} of ${stream} were dropped.`);
    }
  }
  return said.join(" ");
}

function program(status) {
  const argv = status.program?.argv;
  if (!Array.isArray(argv)) return "";
  if (argv.length === 3 && argv[0] === "/bin/sh" && argv[1] === "-c") return visible(argv[2]);
  return visible(
    argv
      .map((word) =>
        /^[\w@%+=:,./-]+$/.test(word) ? word : `'${String(word).replaceAll("'", `'"'"'`)}'`,
      )
      .join(" "),
  );
}

function clock(text) {
  const when = new Date(text);
  if (Number.isNaN(when.getTime())) return visible(text);
  const day =
    when.toDateString() === new Date().toDateString() ? {} : { month: "short", day: "numeric" };
  return when.toLocaleString(undefined, {
    ...day,
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
  });
}

function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "";
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

function elapsed(status) {
  if (typeof status.elapsed === "number") return status.elapsed;
  return status.start_time && !isFinal(status)
    ? (Date.now() - Date.parse(status.start_time)) / 1000
    : null;
}

function amount(bytes) {
  if (typeof bytes !== "number") return "an unknown number of bytes";
  for (const [unit, size] of [
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ]) {
    if (bytes >= size) return `${(bytes / size).toFixed(1)} ${unit}`;
  }
  return `${bytes} bytes`;
}
