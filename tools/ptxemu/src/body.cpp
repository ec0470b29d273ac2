// body.cpp - the statements of a kernel, with its labels, its scopes and the directives between them.
#include <algorithm>
#include "parser.h"

namespace ptx {

void Parser::parse_loc() {  // .loc file line column[, function_name ..., inlined_at ...]
    int l = peek().line;
    p++;
    file = atoi(next().text.c_str());
    loc = atoi(next().text.c_str());
    skip_line(l);
}

// Everything that is not an instruction; false at an instruction.
bool Parser::parse_directive(Body& body) {
    const Token& t = peek();
    if (accept("{")) {
        open_scope(body);
        return true;
    }
    if (accept("}")) {
        close_scope(body);
        return true;
    }
    if (accept(";")) return true;
    if (t.text == ".loc") {
        parse_loc();
        return true;
    }
    if (t.text == ".pragma") {
        skip_past(";");
        return true;
    }
    if (t.text == ".reg") {
        p++;
        parse_registers(body.b);
        return true;
    }
    if (t.text == ".param") {  // call sequence
        while (!is(";") && !is("[")) p++;
        body.b.scopes.back().call_params[tok[p - 1].text] = "";
        skip_past(";");
        return true;
    }
    if (t.text == ".branchtargets") {
        p++;
        auto& table = body.b.branch_tables[body.last_label];
        while (!accept(";")) {
            table.push_back(next().text);
            accept(",");
        }
        return true;
    }
    if (t.text == ".callprototype") {
        skip_past(";");
        return true;
    }
    if (t.text[0] == '.') {
        parse_variable(&body.b);
        return true;
    }
    if (is(":", 1)) {
        body.last_label = t.text;
        if (!body.labels.back().places.emplace(t.text, (s32)body.b.kernel.code.size()).second)
            syntax(t.line, "label " + t.text + " is defined twice in one scope");
        body.every_label[t.text] = (s32)body.b.kernel.code.size();
        p += 2;
        return true;
    }
    return false;
}

Statement Parser::parse_statement() {
    const Token& t = peek();
    Statement s;
    s.line = t.line;
    s.file = file;
    s.loc = loc;
    size_t begin = t.begin;
    if (accept("@")) {
        s.guard_negated = accept("!");
        s.guard = next().text;
    }
    s.opcode = next().text;
    while (!is(";")) {
        s.ops.push_back(parse_operand());
        if (!accept(",")) {
            if (is("(")) continue;
            break;
        }
    }
    size_t end = peek().end;
    expect(";");
    s.text = text.substr(begin, end - begin);
    std::replace(s.text.begin(), s.text.end(), '\n', ' ');
    std::replace(s.text.begin(), s.text.end(), '\t', ' ');
    return s;
}

void Parser::open_scope(Body& body) {
    body.b.scopes.emplace_back();
    body.labels.emplace_back();
}
// Branches to labels of this scope have their targets; the others are looked for further out.
void Parser::close_scope(Body& body) {
    body.b.scopes.pop_back();
    Body::Labels mine = std::move(body.labels.back());
    body.labels.pop_back();
    for (size_t k : mine.branches) {
        Inst& i = body.b.kernel.code[k];
        auto it = mine.places.find(i.label);
        if (it != mine.places.end()) i.target = it->second;
        else if (body.labels.empty()) syntax(i.line, "unknown label " + i.label);
        else body.labels.back().branches.push_back(k);
    }
}
void Parser::resolve_tables(Body& body) {
    for (Inst& i : body.b.kernel.code)
        if (i.flow == Flow::BranchIndexed)
            for (auto& l : body.b.branch_tables[i.label]) {
                auto it = body.every_label.find(l);
                if (it == body.every_label.end()) syntax(i.line, "unknown label " + l);
                i.targets.push_back(it->second);
            }
}

void Parser::parse_body(Kernel& k) {
    Body body{{m, k, {}, {}, {}, {}}, {}, {}, {}};
    file = loc = 0;
    expect("{");
    open_scope(body);
    while (!body.b.scopes.empty()) {
        if (peek().text.empty() && !peek().string) syntax(peek().line, "unexpected end of kernel");
        if (parse_directive(body)) continue;
        k.code.push_back(decode(body.b, parse_statement()));
        if (k.code.back().flow == Flow::Branch) body.labels.back().branches.push_back(k.code.size() - 1);
    }
    Inst end;  // falling off the end of a kernel is ret
    end.flow = Flow::Exit;
    end.opcode = "ret";
    end.text = "(end of kernel)";
    end.line = peek().line;
    k.code.push_back(end);
    for (u32 n = 0; n < k.code.size(); n++) k.code[n].index = n;
    resolve_tables(body);
}

}  // namespace ptx
