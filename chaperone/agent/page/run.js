// One run: its status in words, its live output, and the buttons for a token that may.

const FIRST = 131_072; // bytes: the end of a stream that is read first, and what "Earlier" brings
const KEPT = 200_000; // characters that stay in the page: it takes 50 ms to lay out so many
const PIECE = 16_384; // bytes that come and go together
const FRAME_MS = 100; // at least, between two changes of the text

class Stream {
  #agent;
  #id;
  #name;
  #signal;
  #ansi = new Ansi();
  #decoder = new TextDecoder();
  #pending = [];
  #flushing = 0;
  #flushed = 0;
  #kept = 0;
  #most = KEPT;
  #start = 0;

  constructor(agent, id, name, signal) {
    [this.#agent, this.#id, this.#name, this.#signal] = [agent, id, name, signal];
    this.element = document.createElement("div");
    this.element.className = "stream";
    const title = document.createElement("h3");
    title.textContent = name;
    title.id = `${name}-title`;
    this.earlier = document.createElement("button");
    this.earlier.type = "button";
    this.earlier.textContent = `Earlier ${name}`;
    this.earlier.hidden = true;
    this.earlier.addEventListener("click", () => this.#before());
    this.note = document.createElement("span");
    this.note.className = "note";
    this.text = document.createElement("pre");
    this.text.tabIndex = 0;
    this.text.className = "empty";
    this.text.setAttribute("role", "log");
    this.text.setAttribute("aria-live", "off");
    this.text.setAttribute("aria-labelledby", title.id);
    this.element.append(title, this.note, " ", this.earlier, this.text);
  }

  // Read to the end of the run, from where we are when the agent is lost meanwhile.
  async follow() {
    let at = null;
    for (let failures = 0; !this.#signal.aborted;) {
      try {
        if (at === null) {
          const size = Number((await this.#ask("HEAD")).headers.get("Content-Length"));
          at = this.#start = Math.max(0, size - FIRST);
          this.#moved();
        }
        const answer = await this.#ask("GET", at, "?follow");
        for await (const bytes of chunks(answer, 0)) {
          failures = 0;
          for (let from = 0; from < bytes.length; from += PIECE) {
            const part = bytes.subarray(from, from + PIECE);
            at += part.length;
            this.#push({ text: this.#decoder.decode(part, { stream: true }), bytes: part.length });
          }
        }
        const rest = this.#decoder.decode();
        if (rest) this.#push({ text: rest, bytes: 0 });
        if (!at) this.note.textContent = "empty";
        return;
      } catch (error) {
        if (this.#signal.aborted) return;
        if (error.status === 404) {
          this.note.textContent = "gone";
          return;
        }
        await pause(RETRY_MS[Math.min(failures, RETRY_MS.length - 1)], this.#signal);
        failures += 1;
      }
    }
  }

  #ask(method, from = 0, query = "", to = "") {
    const headers = from || to ? { Range: `bytes=${from}-${to}` } : {};
    return this.#agent.request(method, this.#agent.run(this.#id, `/${this.#name}${query}`), {
      headers,
      signal: this.#signal,
    });
  }

  #push(piece) {
    this.#pending.push(piece);
    this.#kept += piece.text.length;
    while (this.#kept > this.#most) {
      const first = this.text.firstElementChild;
      if (!first && this.#pending.length < 2) break;
      first?.remove();
      this.#drop(first ? first.piece : this.#pending.shift());
    }
    const due = Math.max(0, FRAME_MS - (performance.now() - this.#flushed));
    this.#flushing ||= setTimeout(() => {
      this.#flushing = 0;
      this.#flush();
    }, due);
  }

  // The beginning of what is shown; whatever is dropped can be asked for again.
  #drop(piece) {
    this.#kept -= piece.text.length;
    this.#start += piece.bytes;
    this.#moved();
  }

  #moved() {
    this.earlier.hidden = this.#start <= 0;
    this.note.textContent = this.#start > 0 ? `from byte ${this.#start} on` : "";
  }

  #flush() {
    const text = this.text;
    this.#flushed = performance.now();
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
    for (const piece of this.#pending.splice(0)) text.append(this.#shown(piece, this.#ansi));
    text.classList.toggle("empty", !text.childElementCount);
    if (atEnd) text.scrollTop = text.scrollHeight;
  }

  #shown(piece, ansi) {
    const span = document.createElement("span");
    span.append(ansi.nodes(piece.text));
    span.piece = piece;
    return span;
  }

  async #before() {
    this.earlier.disabled = true;
    const to = this.#start,
      from = Math.max(0, to - FIRST);
    try {
      const bytes = await (await this.#ask("GET", from, "", to - 1)).arrayBuffer();
      if (to === this.#start) {
        // nothing was dropped meanwhile
        const piece = { text: new TextDecoder().decode(bytes), bytes: to - from };
        this.#most += piece.text.length; // what a person asked for stays
        this.#kept += piece.text.length;
        this.text.prepend(this.#shown(piece, new Ansi()));
        this.#start = from;
        this.#moved();
        this.text.focus();
      }
    } catch (error) {
      this.note.textContent = visible(error.message);
    }
    this.earlier.disabled = false;
  }
}

class RunView {
  #agent;
  #stop = new AbortController();
  #status;

  constructor(agent, id) {
    this.#agent = agent;
    this.id = id;
    $("run-title").textContent = visible(id);
    $("words").textContent = "";
    $("run-error").textContent = "";
    $("list").replaceChildren();
    const streams = ["stdout", "stderr"].map(
      (name) => new Stream(agent, id, name, this.#stop.signal),
    );
    $("streams").replaceChildren(...streams.map((stream) => stream.element));
    for (const verb of ["stop", "kill"]) $(verb).onclick = () => this.#ask(verb);
    this.#load().then(() => streams.forEach((stream) => stream.follow()));
  }

  close() {
    this.#stop.abort();
  }

  async #load() {
    for (let failures = 0; !this.#stop.signal.aborted; failures += 1) {
      try {
        this.show(await this.#agent.json(this.#agent.run(this.id), { signal: this.#stop.signal }));
        return;
      } catch (error) {
        if (error.status === 404) {
          $("words").textContent = "There is no such run in this spool.";
          return;
        }
        await pause(RETRY_MS[Math.min(failures, RETRY_MS.length - 1)], this.#stop.signal);
      }
    }
  }

  // A new status of this run; one of another run is not for us.
  show(status) {
    if (status.run_id !== this.id || this.#stop.signal.aborted) return;
    this.#status = status;
    $("words").textContent = sentences(status);
    $("words").className = tone(status);
    $("actions").hidden = isFinal(status) || !this.#agent.may;
    const rusage = status.rusage ?? {};
    const facts = {
      State: status.state,
      Program: program(status),
      Directory: status.program?.cwd,
      Labels: Object.entries(status.labels)
        .map(([name, value]) => `${name}=${value}`)
        .join("\n"),
      Host: status.chaperone_host,
      Created: status.create_time,
      Started: status.start_time,
      Ended: status.end_time,
      Elapsed: duration(elapsed(status)),
      "CPU time": rusage.utime == null ? null : `${(rusage.utime + rusage.stime).toFixed(2)} s`,
      Memory: rusage.maxrss == null ? null : amount(rusage.maxrss),
      Output: amount(status.stdout?.bytes),
      Errors: amount(status.stderr?.bytes),
      Processes: status.pid && `program ${status.pid}, chaperone ${status.chaperone_pid}`,
      Connection: status.connection?.state,
    };
    $("list").replaceChildren(
      ...Object.entries(facts)
        .filter(([, value]) => value)
        .flatMap(([name, value]) => {
          const term = document.createElement("dt"),
            what = document.createElement("dd");
          term.textContent = name;
          what.textContent = String(value).split("\n").map(visible).join("\n");
          return [term, what];
        }),
    );
  }

  async #ask(verb) {
    const sentence =
      verb === "stop"
        ? `Stop ${visible(this.id)}? It gets its stop signal, and SIGKILL after its grace.`
        : `Kill ${visible(this.id)}? All its processes get SIGKILL at once.`;
    if (!(await confirmed(sentence, verb === "stop" ? "Stop it" : "Kill it"))) return;
    $("run-error").textContent = "";
    try {
      this.show(await (await this.#agent.control(this.id, verb)).json());
    } catch (error) {
      $("run-error").textContent = `Unable to ${verb} it: ${visible(error.message)}`;
    }
  }
}

function confirmed(question, yes) {
  const dialog = $("confirm");
  $("question").textContent = question;
  $("yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
