// What the page asks of the agent. The token stays in this object, and in no storage.

const API = "/api/v1";

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

class Agent {
  #token;
  constructor(token) {
    this.#token = token;
    this.spool = "";
    this.may = false;
  }

  async request(method, path, { body, headers = {}, signal } = {}) {
    const given = { ...headers, Authorization: `Bearer ${this.#token}` };
    if (body !== undefined && !given["Content-Type"]) given["Content-Type"] = "application/json";
    const answer = await fetch(API + path, {
      method,
      signal,
      headers: given,
      body,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
    if (answer.ok || answer.status === 416) return answer;
    let message = `the agent answered with HTTP status ${answer.status}`;
    try {
      message = (await answer.json()).error.message;
    } catch {
      /* no error object */
    }
    throw new Refused(answer.status, message);
  }

  async json(path, how) {
    return (await this.request("GET", path, how)).json();
  }

  at(rest) {
    return `/${encodeURIComponent(this.spool)}/${rest}`;
  }
  run(id, rest = "") {
    return this.at(`runs/${encodeURIComponent(id)}${rest}`);
  }

  // Every run, a page at a time.
  async *runs(all, signal) {
    for (let after = ""; after !== null;) {
      const query = new URLSearchParams({
        limit: "1000",
        ...(all && { state: "all" }),
        ...(after && { after }),
      });
      const found = await this.json(this.at(`runs?${query}`), { signal });
      yield found;
      after = found.next;
    }
  }

  // The lines of an answer, each as an object; undefined for a sign of life.
  async *lines(answer) {
    const decoder = new TextDecoder();
    let left = "";
    for await (const bytes of chunks(answer)) {
      const lines = (left + decoder.decode(bytes, { stream: true })).split("\n");
      left = lines.pop();
      for (const line of lines) yield line ? JSON.parse(line) : undefined;
    }
  }

  control(id, line) {
    return this.request("POST", this.run(id, "/control"), {
      body: line,
      headers: { "Content-Type": "text/plain" },
    });
  }
}

// An answer without a byte for so long is a lost agent: it sends a sign of life each 15 s.
const SILENCE_MS = 45_000;

async function* chunks(answer, silence = SILENCE_MS) {
  const reader = answer.body.getReader();
  try {
    for (;;) {
      let timer;
      const late = new Promise((_, reject) => {
        if (silence) timer = setTimeout(() => reject(new Error("the agent is silent")), silence);
      });
      const { done, value } = await Promise.race([reader.read(), late]).finally(() =>
        clearTimeout(timer),
      );
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const pause = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        resolve();
      },
      { once: true },
    );
  });
